"""The sending side of vLLM's NCCL weight transfer, for engines that own their GPUs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import ray
import torch

if TYPE_CHECKING:
    from app.workers.learner import LearnerWorker


class EngineActorsClient:
    """vLLM's weight-sync control calls, sent to all engine actors at once. version: of the weights that are sent next."""

    def __init__(self, engines: Sequence[Any], tensor_parallel: int) -> None:
        self._engines = list(engines)
        self._tensor_parallel = tensor_parallel
        self.version = 0

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        # Rank 0 of the group is the sender; each engine's workers follow those of the engine before it.
        ray.get(
            [
                engine.transfer.remote("init_weight_transfer_engine", init_info | {"rank_offset": 1 + k * self._tensor_parallel})
                for k, engine in enumerate(self._engines)
            ]
        )

    def start_weight_update(self) -> None:
        ray.get([engine.start_update.remote() for engine in self._engines])

    def update_weights(self, update_info: Any) -> None:
        ray.get([engine.transfer.remote("update_weights", update_info) for engine in self._engines])

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        ray.get([engine.finish_update.remote(self.version) for engine in self._engines])


class NcclSender:
    """vLLM's trainer-side engine over the learner's policy; rank 0 sends, the other ranks take part in gathering."""

    def __init__(self, trainer: Any, client: EngineActorsClient) -> None:
        self._trainer, self._client = trainer, client

    def send(self, version: int) -> None:
        """Give every engine the policy as it is now; tokens that it samples from here on carry `version`. Collective."""
        self._client.version = version
        self._trainer.send_weights()


def connect(worker: LearnerWorker, engines: Sequence[Any], *, rank: int, tensor_parallel: int, address: tuple[str, int]) -> NcclSender:
    """Form the group of rank 0 and all engine workers."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    class PolicySource(WeightSource):
        def metadata(self) -> list[ParamMeta]:
            return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in worker.policy_parameters()]

        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            return worker.policy_parameters()

    client = EngineActorsClient(engines, tensor_parallel)
    trainer = WeightTransferTrainerFactory.trainer_init(
        NCCLTrainerInitInfo(master_address=address[0], master_port=address[1], world_size=1 + len(engines) * tensor_parallel, rank=rank),
        client=client,
        source=PolicySource(),
    )
    return NcclSender(trainer, client)
