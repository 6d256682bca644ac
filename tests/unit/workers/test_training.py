"""How the driver waits for supervised training: requests to stop, and the deadline."""

from __future__ import annotations

import threading
import time

import pytest

from app.errors import DeadlineError, Interrupted
from app.workers import training


class Trainer:
    """Never gets to its first step; ends when it is told to."""

    def __init__(self) -> None:
        self.ended = threading.Event()

    def fit(self) -> None:
        self.ended.wait(30)


class Channel:
    def __init__(self) -> None:
        self.last_event = time.monotonic()
        self.stop_asked = False
        self.failure = None

    def request_stop(self) -> None:
        self.stop_asked = True


def wait(channel: Channel, *, stop: bool, deadline_seconds: float) -> None:
    trainer = Trainer()
    try:
        training._wait_for(trainer, channel, lambda: stop, phase="sft training", deadline_seconds=deadline_seconds)  # type: ignore[arg-type]
    finally:
        trainer.ended.set()


def test_a_stop_while_workers_start_does_not_wait_for_their_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "START_GRACE_SECONDS", 0.0)
    channel = Channel()
    with pytest.raises(Interrupted, match="sft training stopped before its first step"):
        wait(channel, stop=True, deadline_seconds=30)
    assert channel.stop_asked


def test_silence_beyond_the_deadline_is_an_error() -> None:
    channel = Channel()
    with pytest.raises(DeadlineError, match=r"nothing logged for 0\.1 s"):
        wait(channel, stop=False, deadline_seconds=0.1)
    assert channel.stop_asked
