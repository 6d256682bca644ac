"""Processes of a reward rule that die or hang while nobody looks: what is lost is one score, or one batch, whenever it is collected."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.exceptions import ActorDiedError, GetTimeoutError

from app.rewards.part import Failed, Sample
from app.rewards.pattern import PatternReward
from app.workers import rule_processes
from app.workers.rule_processes import RuleProcesses

DEADLINE = 10.0
LATE = Failed("no score within deadline_seconds = 10")


class World:
    """Ray and a clock. A sample takes a second and its score is its number; "die" ends its process, "hang" never ends."""

    def __init__(self) -> None:
        self.now = 0.0
        self.started = 0

    def monotonic(self) -> float:
        return self.now

    def start(self) -> Any:
        self.started += 1
        return SimpleNamespace(score=SimpleNamespace(remote=Process(self).score))

    def kill(self, process: Any) -> None:
        """It answers no more: whoever had asked it has forgotten it."""

    def get(self, answer: tuple[float, Any], timeout: float) -> Any:
        ready, value = answer
        if ready > self.now + timeout:
            self.now += timeout
            raise GetTimeoutError
        self.now = max(self.now, ready)
        if isinstance(value, Exception):
            raise value
        return value


class Process:
    """One call after the other, like an actor. `free`: when it has done what it was given."""

    def __init__(self, world: World) -> None:
        self.world, self.free, self.dead = world, world.now, False

    def score(self, samples: Sequence[Sample]) -> tuple[float, Any]:
        self.free = max(self.free, self.world.now)
        for sample in samples:
            self.free += math.inf if sample.text == "hang" else 1.0
            self.dead |= sample.text == "die"
            if self.dead:
                return self.free, ActorDiedError()
        return self.free, [float(sample.text) for sample in samples] if self.free < math.inf else []


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    world = World()
    monkeypatch.setattr(rule_processes, "ray", world)
    monkeypatch.setattr(rule_processes, "time", world)
    monkeypatch.setattr(RuleProcesses, "_start", lambda self: world.start())
    return world


def processes(count: int = 1) -> RuleProcesses:
    rule = PatternReward(type="pattern", pattern="x", deadline_seconds=DEADLINE, processes=count)
    return RuleProcesses("mine", rule)


def samples(texts: Sequence[str]) -> list[Sample]:
    return [Sample((), text, np.zeros(1, np.int32), True) for text in texts]


TWENTY = ["1", "2", "3", "die", *map(str, range(5, 21))]


def test_a_death_that_is_noticed_after_the_deadline_costs_one_score(world: World) -> None:
    mine = processes()
    pending = mine.submit(samples(TWENTY[:8]))
    world.now = 60.0  # the batch is collected when the learner is done with the one before
    scores = pending.result()
    assert isinstance(scores[3], Failed) and "process died" in scores[3].reason
    assert scores[:3] + scores[4:] == [1, 2, 3, 5, 6, 7, 8]


def test_what_stood_behind_a_death_has_its_deadline_from_when_it_is_asked_again(world: World) -> None:
    mine = processes()
    first, behind = mine.submit(samples(["1", "die"])), mine.submit(samples(["3", "4"]))
    assert isinstance(first.result()[1], Failed)
    later = mine.submit(samples(["5", "6"]))  # while one call follows the other
    world.now += 3 * DEADLINE
    assert behind.result() == [3, 4]
    world.now += 3 * DEADLINE
    assert later.result() == [5, 6]


def test_several_processes_and_several_deaths(world: World) -> None:
    pending = processes(2).submit(samples([*TWENTY[:6], "die", "8", "die", "10"]))
    world.now = 100.0
    scores = pending.result()
    assert [place for place, score in enumerate(scores) if isinstance(score, Failed)] == [3, 6, 8]
    assert world.started == 2 + 3 + 2, "the first killer of a process ends it twice: among others, and alone"


def test_a_rule_that_is_too_slow_is_late_after_its_deadline_also_when_its_process_has_died_before(world: World) -> None:
    mine = processes()
    pending = mine.submit(samples(["die", *["1"] * 7, *["2"] * 8]))  # 16 seconds of work in 8 calls
    scores = pending.result()
    assert isinstance(scores[0], Failed) and scores[1:10] == [1] * 7 + [2] * 2
    assert scores[10:] == [LATE] * 6
    assert world.now == 2 + DEADLINE


def test_a_hang_costs_what_is_left_of_its_batch_and_nothing_of_the_next(world: World) -> None:
    mine = processes()
    pending, following = mine.submit(samples(["1", "hang", "3"])), mine.submit(samples(["4", "hang"]))
    healthy = mine.submit(samples(["6"]))
    assert pending.result() == [1, LATE, LATE]
    assert world.now == DEADLINE
    world.now += 5 * DEADLINE
    began = world.now
    assert following.result() == [4, LATE]
    assert healthy.result() == [6]
    assert world.now <= began + DEADLINE + 1


def test_a_batch_that_is_still_waited_for_after_its_loop_has_ended_is_not_in_the_way_of_the_next(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a learner is lost while a rule takes longer than the loop waits for its thread."""
    both_wait = threading.Barrier(2)

    def get(answer: tuple[float, Any], timeout: float) -> Any:
        with suppress(threading.BrokenBarrierError):
            both_wait.wait(0.5)
        return World.get(world, answer, timeout)

    monkeypatch.setattr(world, "get", get)
    mine = processes()
    given_up, following = mine.submit(samples(["1", "2"])), mine.submit(samples(["3", "4"]))
    with ThreadPoolExecutor(2) as threads:
        answers = [threads.submit(pending.result) for pending in (given_up, following)]
        assert [answer.result() for answer in answers] == [[1, 2], [3, 4]]
