"""Which ranks of a learner are lost."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import ray

from app.workers import learner_group
from app.workers.learner_group import RayLearner


@pytest.mark.parametrize(
    ("ranks", "lost", "waited"),
    [
        (["answers", "answers"], [], False),
        (["hangs", "dead", "dead"], [1, 2], False),
        (["answers", "hangs"], [], True),  # it may only be at work
    ],
)
def test_lost_ranks_are_told_from_those_that_hang(ranks: list[str], lost: list[int], waited: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    moments = [0.0]

    def wait(calls: Sequence[str], num_returns: int, timeout: float) -> tuple[list[str], list[str]]:
        ended = [call for call in calls if not call.startswith("hangs")][:num_returns]
        moments.append(moments[-1] + (0.1 if ended else timeout))
        return ended, []

    def get(call: str) -> int:
        if call.startswith("dead"):
            raise ray.exceptions.ActorDiedError
        return 1

    monkeypatch.setattr(learner_group, "ray", SimpleNamespace(wait=wait, get=get, exceptions=ray.exceptions))
    monkeypatch.setattr("time.monotonic", lambda: moments[-1])
    workers = [SimpleNamespace(pid=SimpleNamespace(remote=lambda call=f"{state} {rank}": call)) for rank, state in enumerate(ranks)]
    assert RayLearner(workers, [], deadline_seconds=1).lost() == lost
    assert (moments[-1] >= learner_group.LOST_SECONDS) == waited
