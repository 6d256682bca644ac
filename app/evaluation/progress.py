"""Progress of a tool, shown as the progress of a stage is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from app.display import StageProgress, open_display

Advance = Callable[[int], None]
"""Called with how many more items are done."""


@contextmanager
def progress(name: str, total: int, done: int = 0) -> Iterator[Advance]:
    """For the length of a block: `advance(n)` tells that n more of `total` items are done, of which `done` already were."""
    display = open_display()
    start, before = time.monotonic(), done

    def state() -> StageProgress:
        seconds = time.monotonic() - start
        return StageProgress(name, done, total, seconds, left=seconds / (done - before) * (total - done) if done > before else None)

    def advance(count: int) -> None:
        nonlocal done
        done += count
        display.update(state())

    display.begin(state())
    try:
        yield advance
        display.end(state())
    finally:
        display.close()
