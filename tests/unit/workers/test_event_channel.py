"""What travels between training workers and the driver's tracker. A queue in place of the actor."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import Future
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import pytest

from app.errors import DiskError
from app.workers import event_channel, training
from app.workers.event_channel import EventChannel
from tests.waiting import wait_until


class Mailbox:
    """Its methods are called like an actor's; what they return is what `ray.get` gives."""

    def __init__(self) -> None:
        self.queue: SimpleQueue[Any] = SimpleQueue()
        self.put = SimpleNamespace(remote=self.queue.put)
        self.take = SimpleNamespace(remote=lambda: [self.queue.get()])
        self.stopped = threading.Event()
        self.stop = SimpleNamespace(remote=self.stopped.set)


@pytest.fixture(autouse=True)
def mailbox(monkeypatch: pytest.MonkeyPatch) -> Mailbox:
    box = Mailbox()
    actor = SimpleNamespace(remote=lambda: box)
    ray = SimpleNamespace(remote=lambda **_: lambda _: actor, get=lambda value: value, kill=lambda _: None)
    monkeypatch.setattr(event_channel, "ray", ray)
    return box


class Tracker:
    """Has room for so many points."""

    def __init__(self, room: int) -> None:
        self.points: list[tuple[str, int]] = []
        self.room = room

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        if len(self.points) == self.room:
            raise DiskError("metrics.jsonl cannot be written")
        self.points.append((stage, step))


def train_for_ever(tracker: Tracker) -> None:
    """Three points are on their way; the workers train on."""
    trainer = SimpleNamespace(fit=Future[None]().result)
    with EventChannel(tracker) as channel:
        for step in (1, 2, 3):
            channel.sender.log("sft", step, {"loss": 1.0})
        training._wait_for(trainer, channel, lambda: False, phase="sft training", deadline_seconds=60)  # type: ignore[arg-type]


def test_a_tracker_that_fails_ends_the_training_at_once_with_its_reason(mailbox: Mailbox) -> None:
    """Not at the deadline, as a training that logs nothing."""
    tracker = Tracker(room=2)
    with pytest.raises(DiskError, match=r"metrics\.jsonl"):
        train_for_ever(tracker)
    assert tracker.points == [("sft", 1), ("sft", 2)]
    assert mailbox.stopped.is_set()


def test_workers_at_work_are_waited_for_before_they_have_logged_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed training logs nothing before its `log_every`th step, and a stop asked for by then is to leave a checkpoint."""
    monkeypatch.setattr(training, "START_GRACE_SECONDS", 0.0)
    tracker, ended = Tracker(room=0), Future[Any]()
    with EventChannel(tracker) as channel:  # type: ignore[arg-type]

        def stop_requested() -> bool:
            began = channel.last_event
            channel.sender.log("sft", 200, {})
            wait_until(lambda: channel.last_event != began, "word of the workers")
            ended.set_result(SimpleNamespace(return_value="stopped with a checkpoint"))
            return True

        trainer: Any = SimpleNamespace(fit=ended.result)
        outcome = training._wait_for(trainer, channel, stop_requested, phase="sft training", deadline_seconds=60)
    assert outcome == "stopped with a checkpoint"  # type: ignore[comparison-overlap]
    assert tracker.points == []
