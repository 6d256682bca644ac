"""Weights from the learner's GPUs to the engines' by vLLM's own transfer: over NCCL to engines that own theirs, by CUDA IPC to engines that
share the learner's."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import ray
import torch
from ray.exceptions import RayError

from app.config.rollout import Transfer
from app.errors import first_line

if TYPE_CHECKING:
    from app.workers.learner import LearnerWorker


class EngineActorsClient:
    """vLLM's weight-sync control calls, sent to all engine actors at once. version: of the weights that are sent next."""

    def __init__(self, engines: Sequence[Any], tensor_parallel: int | None) -> None:
        """tensor_parallel: workers of each engine, all of which have a rank in the sender's group; None where there is no group."""
        self._engines = list(engines)
        self._tensor_parallel = tensor_parallel
        self.version = 0

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        calls = []
        for k, engine in enumerate(self._engines):
            # Rank 0 of a group is the sender; each engine's workers follow those of the engine before it.
            place = {} if self._tensor_parallel is None else {"rank_offset": 1 + k * self._tensor_parallel}
            calls.append(engine.transfer.remote("init_weight_transfer_engine", init_info | place))
        ray.get(calls)

    def start_weight_update(self) -> None:
        ray.get([engine.start_update.remote() for engine in self._engines])

    def update_weights(self, update_info: Any) -> None:
        try:
            ray.get([engine.transfer.remote("update_weights", update_info) for engine in self._engines])
        except RayError as error:  # the engine is lost, or a process of it, or it has no memory for what comes
            if self._tensor_parallel is not None:
                _end_process(f"a rollout engine failed in the push of policy version {self.version} ({first_line(error)})")
            raise

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        ray.get([engine.finish_update.remote(self.version) for engine in self._engines])


def _end_process(why: str) -> None:
    """NCCL waits for a lost member for ever, in a call that nothing interrupts. Learner and engines then start anew, as after any rank
    that is lost."""
    sys.stderr.write(f"{why}: this learner rank ends, because its broadcast never would\n")
    sys.stderr.flush()
    os._exit(1)


class GpuSender:
    """vLLM's trainer-side engine over the learner's policy; every rank takes part."""

    def __init__(self, trainer: Any, client: EngineActorsClient) -> None:
        self._trainer, self._client = trainer, client

    def send(self, version: int) -> None:
        """Give every engine the policy as it is now; tokens that it samples from here on carry `version`. Collective."""
        self._client.version = version
        self._trainer.send_weights()


def connect(
    worker: LearnerWorker, engines: Sequence[Any], transfer: Transfer, *, rank: int, tensor_parallel: int, address: tuple[str, int]
) -> GpuSender:
    """nccl: a group of rank 0, which sends, and all engine workers; the other ranks take part in gathering. ipc: each rank hands out what
    lies on its own GPU, and an engine reads what lies on the one that it shares."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    class PolicySource(WeightSource):
        def __init__(self) -> None:
            # Once: under ZeRO 3 even the shapes of merged weights are known only where they are gathered.
            self._metadata = [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in worker.policy_parameters()]

        def metadata(self) -> list[ParamMeta]:
            return self._metadata

        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            return worker.policy_parameters()

    in_group = tensor_parallel if transfer == "nccl" else None
    client, source = EngineActorsClient(engines, in_group), PolicySource()
    largest = max(math.prod(meta.shape) * meta.dtype.itemsize for meta in source.metadata())
    members = 1 + len(engines) * tensor_parallel
    trainer = WeightTransferTrainerFactory.trainer_init(
        init_info(transfer, rank=rank, members=members, address=address, largest=largest), client=client, source=source
    )
    return GpuSender(trainer, client)


def init_info(transfer: Transfer, *, rank: int, members: int, address: tuple[str, int], largest: int) -> Any:
    """What vLLM is told of its trainer's side. Weights travel in buffers of fixed size: a second copy of the policy may not fit.

    largest: bytes of the largest weight, which has to fit into one that is handed over by CUDA IPC; that of a large vocabulary may be
    more than vLLM's default."""
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
    from vllm.distributed.weight_transfer.packed_tensor import DEFAULT_PACKED_BUFFER_SIZE_BYTES

    if transfer == "ipc":
        return IPCTrainerInitInfo(rank=rank, packed=True, packed_buffer_size_bytes=max(largest, DEFAULT_PACKED_BUFFER_SIZE_BYTES))
    # One buffer, because each has a CUDA stream of its own, and weights that are gathered or merged on one are not waited for on another.
    return NCCLTrainerInitInfo(
        rank=rank, packed=True, packed_num_buffers=1, master_address=address[0], master_port=address[1], world_size=members
    )
