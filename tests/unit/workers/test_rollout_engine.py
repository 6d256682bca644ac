"""What an engine's thread does between steps, and what a response says of itself."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import numpy as np
import pytest

from app.workers.rollout_engine import _sampled
from app.workers.step_loop import StepLoop


def test_each_token_has_the_version_of_the_weights_that_sampled_it() -> None:
    spans = [SimpleNamespace(version="3", start=0, end=2), SimpleNamespace(version="4", start=2, end=5)]
    ids = [7, 8, 9, 7, 1]
    steps = [{token: SimpleNamespace(logprob=-0.5 * place), 99: SimpleNamespace(logprob=0.0)} for place, token in enumerate(ids)]
    sampled = _sampled(SimpleNamespace(token_ids=ids, logprobs=steps, finish_reason="stop", weight_versions=spans))
    assert sampled.versions.tolist() == [3, 3, 4, 4, 4]
    assert sampled.ids.tolist() == ids and sampled.finish == "stop"
    np.testing.assert_allclose(sampled.logprobs, [0, -0.5, -1, -1.5, -2])


class Counter:
    """An engine that is busy for so many steps; its `gate` lets one step through at a time."""

    def __init__(self, steps: int) -> None:
        self.left, self.gate = steps, threading.Semaphore(0)
        self.broken = threading.Event()
        self.loop = StepLoop(self.step, lambda: self.left > 0, lambda error: self.broken.set())

    def step(self) -> None:
        assert self.gate.acquire(timeout=10)
        self.left -= 1
        if self.left == 13:
            raise ZeroDivisionError("a step failed")


def test_calls_are_done_between_steps_in_their_order() -> None:
    counter = Counter(5)
    seen: list[tuple[str, int]] = []
    calls = [counter.loop.call(lambda name=name: seen.append((name, counter.left))) for name in "ab"]
    counter.gate.release()
    for call in calls:
        call.result(10)
    assert [name for name, _ in seen] == ["a", "b"]
    last = counter.loop.call(lambda: counter.left)
    for _ in range(4):
        counter.gate.release()
    assert last.result(10) < 5
    assert counter.loop.call(threading.current_thread).result(10).name == "engine"


def test_an_error_of_a_call_is_the_callers_alone() -> None:
    counter = Counter(0)
    with pytest.raises(ZeroDivisionError):
        counter.loop.call(lambda: 1 // 0).result(10)
    assert counter.loop.call(lambda: 7).result(10) == 7


def test_a_step_that_fails_is_told_to_all_who_ask_from_then_on() -> None:
    counter = Counter(14)
    counter.gate.release()
    assert counter.broken.wait(10)
    with pytest.raises(ZeroDivisionError, match="a step failed"):
        counter.loop.call(lambda: None).result(10)
