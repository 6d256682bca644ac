"""When stacks are written, and that nothing else comes of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from ray.exceptions import RayTaskError

from app.workers import watchdog
from app.workers.watchdog import late, patiently, watching


class Wait:
    """A wait for something that comes after so many seconds; keeps what it was given."""

    def __init__(self, lasts: float) -> None:
        self.left, self.given = lasts, list[float]()

    def __call__(self, seconds: float) -> str:
        self.given.append(round(seconds, 1))
        self.left -= seconds
        if self.left > 0:
            raise TimeoutError
        return "there"


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    headlines: list[str] = []

    def write(file: Path, headline: str) -> None:
        file.write_text(headline)
        headlines.append(headline.partition(",")[0])

    monkeypatch.setattr(watchdog, "write_stacks", write)
    return headlines


def test_stacks_come_early_once_a_phase_and_the_wait_goes_on(tmp_path: Path, written: list[str]) -> None:
    notes: list[str] = []
    waits = {"rollout": Wait(6), "update": Wait(3)}
    with watching(tmp_path, note=notes.append, early_share=0.4):
        assert [patiently(wait, phase=phase, seconds=10) for phase, wait in waits.items()] == ["there"] * 2
        with pytest.raises(TimeoutError):
            patiently(again := Wait(11), phase="rollout", seconds=10)
        assert str(late("rollout", "nothing came")).startswith(
            f"rollout: nothing came; what every process did is in {tmp_path}/stacks-rollout-"
        )
    assert [wait.given for wait in (*waits.values(), again)] == [[4.0, 10.0], [4.0], [10.0]]
    assert written == ["rollout", "rollout"]
    assert [note.partition(";")[0] for note in notes] == ["rollout lasts more than 4 s"]


@pytest.mark.parametrize("early_share", [None, 0.5])
def test_a_run_does_not_end_for_want_of_stacks(early_share: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(watchdog, "write_stacks", fail)
    note: Callable[[str], None] = pytest.fail
    with watching(tmp_path, note=note, early_share=early_share):
        assert patiently(Wait(8), phase="push", seconds=10) == "there"
        assert str(late("push", "nothing came")) == "push: nothing came"


def test_a_worker_whose_own_wait_was_too_long_is_no_wait_that_lasts(tmp_path: Path, written: list[str]) -> None:
    """Ray raises it as the worker did: tensor-parallel engines of vLLM, and whatever has a deadline itself."""
    asked: list[float] = []

    def fail(seconds: float) -> None:
        asked.append(seconds)
        raise RayTaskError("generate", "traceback", TimeoutError("RPC call to execute_model timed out")).as_instanceof_cause()

    with watching(tmp_path, note=pytest.fail, early_share=0.5), pytest.raises(RayTaskError):
        patiently(fail, phase="rollout", seconds=10)
    assert asked == [5.0] and written == []


def test_who_does_not_watch_just_waits(written: list[str]) -> None:
    wait = Wait(8)
    assert patiently(wait, phase="push", seconds=10) == "there"
    assert str(late("push", "nothing came")) == "push: nothing came"
    assert (wait.given, written) == ([10.0], [])
