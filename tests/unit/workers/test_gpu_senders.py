"""Weights from GPU to GPU by vLLM's own classes on both sides; only what touches a GPU is replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from app.config.rollout import Transfer
from app.workers import gpu_transfer
from app.workers.gpu_transfer import GpuSender, connect, init_info
from app.workers.learner import LearnerWorker

WEIGHTS = {"embed": torch.arange(12.0).view(4, 3).bfloat16(), "norm": torch.ones(3), "head": torch.full((2, 3), 7.0).bfloat16()}
GIB = 2**30


class Rank:
    """A rank of the learner. passes: over the policy, each of which is a collective under ZeRO 3."""

    def __init__(self) -> None:
        self.passes = 0

    def policy_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        self.passes += 1
        return iter(WEIGHTS.items())


class Engine:
    """A rollout engine: vLLM's receiving side, which refuses what it does not know, and what came."""

    def __init__(self, receiver: Any) -> None:
        self._receiver, self.said = receiver, list[Any]()
        self.updates, self.infos = list[Any](), list[Any]()
        self.transfer = SimpleNamespace(remote=self._transfer)
        self.start_update, self.finish_update = SimpleNamespace(remote=self._start), SimpleNamespace(remote=self._finish)

    def _transfer(self, method: str, info: dict[str, Any]) -> None:
        self.said.append(method)
        if method == "update_weights":
            self.updates.append(self._receiver.update_info_cls(**info))
        else:
            self.infos.append(self._receiver.init_info_cls(**info))

    def _start(self) -> None:
        self.said.append("start")

    def _finish(self, version: int) -> None:
        self.said.append(version)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """What was sent from the first GPU."""
    from vllm.distributed.weight_transfer import ipc_engine, nccl_engine
    from vllm.distributed.weight_transfer.packed_tensor import PackedIpcChunk, pack_tensors

    found: dict[str, torch.Tensor] = {}

    def keep(pairs: Any, chosen: Callable[[Any], torch.Tensor], limit: int) -> Any:
        noted = ((name, found.setdefault(name, tensor)) for name, tensor in pairs)
        return pack_tensors(noted, chosen, limit)

    def broadcast(iterator: Any, group: Any, src: int, post_iter_func: Any, buffer_size_bytes: int, num_buffers: int) -> None:
        keep(iterator, post_iter_func, buffer_size_bytes)

    def hand_over(iterator: Any, gpu_uuid: str, post_iter_func: Any, buffer_size_bytes: int) -> Iterator[PackedIpcChunk]:
        chunk = keep(iterator, post_iter_func, buffer_size_bytes)
        dtypes = [str(dtype).split(".")[-1] for dtype in chunk.dtypes]
        yield PackedIpcChunk(chunk.names, chunk.shapes, dtypes, chunk.tensor_sizes, {gpu_uuid: ("handle",)})

    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", lambda info: "group")
    monkeypatch.setattr(nccl_engine, "packed_nccl_broadcast_producer", broadcast)
    monkeypatch.setattr(ipc_engine, "packed_ipc_producer", hand_over)
    monkeypatch.setattr("torch.accelerator.current_device_index", lambda: 0)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: SimpleNamespace(uuid="GPU-1"))
    monkeypatch.setattr("torch.cuda.ipc_collect", lambda: None)
    monkeypatch.setattr(gpu_transfer, "ray", SimpleNamespace(get=lambda references: references))
    return found


def sender(rank: Rank, number: int, engines: list[Engine], transfer: Transfer) -> GpuSender:
    worker = cast(LearnerWorker, rank)
    return connect(worker, engines, transfer, rank=number, tensor_parallel=2, address=("10.0.0.1", 4000))


def receiving(transfer: Transfer) -> Any:
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    return WeightTransferEngineFactory._registry[transfer]()


@pytest.mark.parametrize("transfer", ["nccl", "ipc"])
def test_a_push_arrives_whole_and_versioned(transfer: Transfer, sent: dict[str, torch.Tensor]) -> None:
    engines = [Engine(receiving(transfer)), Engine(receiving(transfer))]
    sender(Rank(), 0, engines, transfer).send(7)
    assert sent.keys() == WEIGHTS.keys() and all(sent[name] is WEIGHTS[name] for name in sent)
    for engine in engines:
        assert engine.said == ["init_weight_transfer_engine", "start", "update_weights", 7]
        (update,), (info,) = engine.updates, engine.infos
        assert (update.names, update.dtype_names) == (list(WEIGHTS), ["bfloat16", "float32", "bfloat16"])
        assert [list(shape) for shape in update.shapes] == [[4, 3], [3], [2, 3]]
        assert info.packed
    if transfer == "nccl":
        assert [engine.infos[0].rank_offset for engine in engines] == [1, 3]
        assert {engine.infos[0].world_size for engine in engines} == {5}


@pytest.mark.parametrize("transfer", ["nccl", "ipc"])
def test_all_ranks_gather_the_policy_equally_often_and_once_a_push(transfer: Transfer, sent: dict[str, torch.Tensor]) -> None:
    """Ranks that do not would wait for each other for ever."""
    ranks, engine = [Rank(), Rank()], Engine(receiving(transfer))
    senders = [sender(rank, number, [engine], transfer) for number, rank in enumerate(ranks)]
    assert [rank.passes for rank in ranks] == [1, 1]
    for version in (1, 2):
        for each in senders:
            each.send(version)
    assert [rank.passes for rank in ranks] == [3, 3]
    assert [said for said in engine.said if isinstance(said, int)] == [1, 2]


def test_weights_that_are_gathered_on_a_stream_are_sent_from_it() -> None:
    """vLLM takes its buffers in turns, each on a CUDA stream of its own, and lets none of them wait for another."""
    assert init_info("nccl", rank=0, members=2, address=("10.0.0.1", 4000), largest=1).packed_num_buffers == 1


@pytest.mark.parametrize(("largest", "room"), [(12, GIB), (3 * GIB, 3 * GIB)])
def test_the_largest_weight_fits_into_the_memory_that_is_handed_over(largest: int, room: int) -> None:
    """The embeddings of Qwen2.5 7B have 1.02 GiB in bf16; vLLM refuses a weight that is larger than its buffer."""
    assert init_info("ipc", rank=1, members=2, address=("10.0.0.1", 4000), largest=largest).packed_buffer_size_bytes == room
