"""SIGTERM stops a command the way Ctrl-C does, and neither disturbs the cleaning up."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def install() -> None:
    """From now on SIGTERM raises KeyboardInterrupt in the main thread. Call it again after `ray.init`, which replaces the handler."""
    signal.signal(signal.SIGTERM, _interrupt)


@contextmanager
def installed() -> Iterator[None]:
    """`install` for the length of a block."""
    previous = signal.getsignal(signal.SIGTERM)
    install()
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def shielded() -> Iterator[None]:
    """SIGINT and SIGTERM do nothing in this block: a second Ctrl-C must not leave processes behind."""
    previous = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
