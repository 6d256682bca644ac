"""What vLLM's two sides are told of each other before weights go from GPU to GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError, RayError, RayTaskError

from app.workers import gpu_transfer
from app.workers.gpu_transfer import EngineActorsClient


def told(tensor_parallel: int | None, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What each of two engines is told at the beginning."""
    calls: list[Any] = []
    engine = SimpleNamespace(transfer=SimpleNamespace(remote=lambda method, info: calls.append((method, info))))
    monkeypatch.setattr(gpu_transfer, "ray", SimpleNamespace(get=lambda references: references))
    EngineActorsClient([engine, engine], tensor_parallel).init_weight_transfer_engine({"packed": True})
    assert {method for method, _ in calls} == {"init_weight_transfer_engine"}
    return [info for _, info in calls]


def test_workers_of_all_engines_have_a_place_of_their_own_behind_the_sender(monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(4, monkeypatch) == [{"packed": True, "rank_offset": 1}, {"packed": True, "rank_offset": 5}]


def test_where_there_is_no_group_there_are_no_places_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(None, monkeypatch) == [{"packed": True}] * 2


@pytest.mark.parametrize("error", [RayActorError("its node has died"), RayTaskError("transfer", "out of memory", MemoryError())])
@pytest.mark.parametrize("in_group", [True, False])
def test_a_rank_whose_broadcast_waits_for_a_lost_engine_ends(in_group: bool, error: RayError, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would wait to the deadline of the push, and then end the run; lost, it is replaced together with the engines."""
    ended: list[int] = []

    def get(references: Any) -> None:
        raise error

    engine = SimpleNamespace(transfer=SimpleNamespace(remote=lambda method, info: None))
    monkeypatch.setattr(gpu_transfer, "ray", SimpleNamespace(get=get))
    monkeypatch.setattr("os._exit", ended.append)
    with pytest.raises(type(error)):
        EngineActorsClient([engine], 1 if in_group else None).update_weights({})
    assert ended == ([1] if in_group else [])
