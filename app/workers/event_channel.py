"""Metrics from training workers to the driver's tracker, and the request to stop the other way round.

Nothing polls: a thread of the driver waits in the actor's queue, and a worker holds a reference that becomes ready
when a stop is asked for.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import ray

from app.errors import DeadlineError

if TYPE_CHECKING:  # the actor's process would load torch for it
    from app.interfaces import Tracker

DRAIN_SECONDS = 60.0
"""How long either end waits at the end for what is still on the way."""


class Event(NamedTuple):
    """What `Tracker.log` takes. Without metrics it only says that the worker is at work."""

    stage: str
    step: int
    metrics: dict[str, float]


class _Mailbox:
    """An async actor: calls wait inside it without blocking each other."""

    def __init__(self) -> None:
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()
        self._stop = asyncio.Event()

    async def put(self, event: Event | None) -> None:
        await self._events.put(event)

    async def take(self) -> list[Event | None]:
        """Everything that is there, at least one; None marks the end."""
        events = [await self._events.get()]
        while not self._events.empty():
            events.append(self._events.get_nowait())
        return events

    async def stop(self) -> None:
        self._stop.set()

    async def stopped(self) -> None:
        await self._stop.wait()


class EventSender:
    """A worker's end; travels to it by pickle."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox
        self._last: ray.ObjectRef[None] | None = None
        self._stopped: ray.ObjectRef[None] | None = None

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Send without waiting; events of one sender arrive in order."""
        self._last = self._mailbox.put.remote(Event(stage, step, dict(metrics)))

    def flush(self) -> None:
        """Wait until everything sent has arrived."""
        if self._last is not None:
            ray.get(self._last, timeout=DRAIN_SECONDS)

    def stop_requested(self) -> bool:
        """Whether the driver wants the work to end; costs no round trip."""
        if self._stopped is None:
            self._stopped = self._mailbox.stopped.remote()
        return bool(ray.wait([self._stopped], timeout=0)[0])


class EventChannel:
    """The driver's end. Within `with EventChannel(tracker) as channel`, what workers send through `channel.sender` is
    logged to `tracker` from a thread; leaving the block waits for what has arrived, and raises what the tracker raised."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self._mailbox = ray.remote(num_cpus=0)(_Mailbox).remote()
        self._thread = threading.Thread(target=self._drain, name="corral-events", daemon=True)
        self.failure: Exception | None = None
        """What the tracker has raised: nothing is logged any more."""
        self.last_event = time.monotonic()
        """When something last arrived (time.monotonic)."""

    @property
    def sender(self) -> EventSender:
        return EventSender(self._mailbox)

    def request_stop(self) -> None:
        """Make `stop_requested` true for every worker."""
        self._mailbox.stop.remote()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._mailbox.put.remote(None)
        self._thread.join(DRAIN_SECONDS)
        ray.kill(self._mailbox)
        if error is not None:
            return
        if self.failure is not None:
            raise self.failure
        if self._thread.is_alive():
            raise DeadlineError(f"metrics of the training workers have not arrived within {DRAIN_SECONDS:g} s: look at the run's logs/")

    def _drain(self) -> None:
        try:
            while True:
                for event in ray.get(self._mailbox.take.remote()):
                    if event is None:
                        return
                    self.last_event = time.monotonic()
                    if event.metrics:
                        self._tracker.log(*event)
        except Exception as error:  # noqa: BLE001 - handed to the driver's own thread, which raises it
            self.failure = error
