"""Stopping on SIGINT or SIGTERM at a safe point."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from app.errors import Interrupted

_unserved: list[int] = []
"""Signals that came while a block was doing its last work, and that nobody has acted on."""


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Within this block the first SIGINT or SIGTERM only sets a flag, read by calling what is yielded; the second one interrupts.

    A block that ends although a stop was asked for leaves the request to `raise_unserved`.
    Only the main thread can install signal handlers; elsewhere (a Tune trial) the flag stays False.
    """
    requests: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if requests:
            raise KeyboardInterrupt
        requests.append(number)

    try:
        previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:
        previous = {}
    try:
        yield lambda: bool(requests)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    _unserved.extend(requests)


def raise_unserved(done: str) -> None:
    """Raise Interrupted where a stop was asked for too late for the work that has just been committed; `done` says what that was."""
    if _unserved:
        _unserved.clear()
        raise Interrupted(f"{done}; the same command goes on from there")
