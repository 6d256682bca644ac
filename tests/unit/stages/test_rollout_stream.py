"""The thread that follows what is sampled: it has batches judged while the loop does other things, and ends with the loop."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from app.errors import LearnerError, RolloutError
from app.experience import Experience, Prompt, Rollout
from app.stages import rollout_stream
from app.stages.actor_learner import LoopState, actor_learner_loop
from tests.unit.stages.pending import Done, Sampled
from tests.unit.stages.test_actor_learner import World, config, parts

PATIENCE = 20.0
"""Seconds after which a test gives up."""


class Watched(World):
    """Knows how many sequences the reward model was given, and lets the learner wait for that."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.changed = 0, threading.Condition()
        self.seen_by_update: list[int] = []

    def scores(self, sequences: Sequence[Any]) -> Done:
        with self.changed:
            self.asked += len(sequences)
            self.changed.notify_all()
        return super().scores(sequences)

    def update(self, experience: Experience, *, step: int) -> Mapping[str, float]:
        with self.changed:
            self.changed.wait_for(lambda: self.asked >= min(step + 2, 3) * 4, timeout=PATIENCE)
            self.seen_by_update.append(self.asked)
        return super().update(experience, step=step)


def test_the_next_batch_is_judged_while_the_learner_learns(tmp_path: Path) -> None:
    world = Watched()
    actor_learner_loop(parts(world, tmp_path), config(max_lag=1), LoopState(), seed=0)
    assert world.seen_by_update == [8, 12, 12]


class Endless:
    """Sampling that ends for nobody, only when it is cancelled."""

    def __init__(self, world: Unlucky) -> None:
        self.world, self.cancelled = world, threading.Event()

    def finished(self) -> Iterator[Sequence[int]]:
        self.world.waiting.set()
        if not self.cancelled.wait(PATIENCE):
            self.world.journal.append("nobody cancelled")
        self.world.journal.append("sampling ends")
        raise RolloutError("discarded")
        yield [0]

    def __getitem__(self, place: int) -> Rollout:
        raise AssertionError("nothing has ended")

    def result(self) -> list[Rollout]:
        raise AssertionError("a batch is taken without waiting for all")

    def cancel(self) -> None:
        self.cancelled.set()


class Unlucky(World):
    """Its learner dies in the first step, when the engines are busy with the second batch."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting = threading.Event()

    def submit(self, prompts: Sequence[Prompt], *, seed: int) -> Any:
        return Endless(self) if self.journal.count("sample@0") else super().submit(prompts, seed=seed)

    def update(self, experience: Experience, *, step: int) -> Mapping[str, float]:
        assert self.waiting.wait(PATIENCE)
        self.journal.append("learner dies")
        raise LearnerError("gone")


def test_when_the_loop_fails_what_is_under_way_is_given_up_before_anybody_hears_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rollout_stream, "LAST_WAIT_SECONDS", PATIENCE / 2)
    world = Unlucky()
    with pytest.raises(LearnerError):
        actor_learner_loop(parts(world, tmp_path), config(max_lag=1), LoopState(), seed=0)
    assert world.journal == ["publish 0", "sample@0", "learner dies", "sampling ends"]
    assert not caplog.records, "it was not waited for in vain"


class Broken(Sampled):
    def finished(self) -> Iterator[list[int]]:
        yield [0]
        raise RolloutError("engine 0 is beyond help")


class WithBrokenBatch(World):
    """Nothing but a failure comes of its second batch."""

    def submit(self, prompts: Sequence[Prompt], *, seed: int) -> Sampled:
        sampled = super().submit(prompts, seed=seed)
        return Broken(sampled.value) if len([entry for entry in self.journal if "sample" in entry]) == 2 else sampled


def test_a_failure_reaches_the_loop_where_it_takes_the_batch(tmp_path: Path) -> None:
    world = WithBrokenBatch()
    with pytest.raises(RolloutError, match="beyond help"):
        actor_learner_loop(parts(world, tmp_path), config(max_lag=1, steps=6), LoopState(), seed=0)
    assert world.journal == ["publish 0", "sample@0", "sample@0", "update", "publish 1", "sample@1"]


class Slow(Done):
    """Scores that are still under way when the loop fails."""

    def __init__(self, world: World, value: Any) -> None:
        super().__init__(value)
        self.world = world

    def result(self) -> Any:
        self.world.journal.append("waits for scores")
        assert self.world.failed.wait(PATIENCE)  # type: ignore[attr-defined]
        self.world.journal.append("has the scores")
        return super().result()


class FailsMeanwhile(World):
    def __init__(self) -> None:
        super().__init__()
        self.failed = threading.Event()

    def scores(self, sequences: Sequence[Any]) -> Done:
        return Slow(self, super().scores(sequences).value)

    def inspect(self, tokens: Any) -> Any:
        threading.Timer(0.2, self.failed.set).start()
        raise LearnerError("gone")


def test_scores_under_way_are_waited_for_before_anybody_else_asks_for_some(tmp_path: Path) -> None:
    world = FailsMeanwhile()
    with pytest.raises(LearnerError):
        actor_learner_loop(parts(world, tmp_path), config(score_pieces=1), LoopState(), seed=0)
    assert world.journal == ["publish 0", "sample@0", "waits for scores", "has the scores"]
