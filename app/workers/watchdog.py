"""A wait that takes too long leaves the stacks of all processes in the run folder, and says where."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from ray.exceptions import RayTaskError

from app.errors import DeadlineError, first_line
from app.workers.stacks import write_stacks

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass
class _Watch:
    folder: Path
    note: Callable[[str], None]
    early_share: float | None
    told: set[str] = field(default_factory=set)
    """Phases that have taken long: of each it is said, and shown, once."""


_watch: _Watch | None = None


@contextmanager
def watching(folder: Path, *, note: Callable[[str], None], early_share: float | None = None) -> Iterator[None]:
    """Within this block waits of this process that pass their deadline write stacks into `folder`, and so does, once per phase, one
    that has lasted `early_share` of its deadline; of that `note` hears."""
    global _watch
    before, _watch = _watch, _Watch(folder, note, early_share)
    try:
        yield
    finally:
        _watch = before


def patiently(wait: Callable[[float], T], *, phase: str, seconds: float) -> T:
    """`wait(seconds)`, which raises TimeoutError after so long; in two parts where stacks are wanted early."""
    watch = _watch
    if watch is None or watch.early_share is None or phase in watch.told:
        return wait(seconds)
    end = time.monotonic() + seconds
    try:
        return wait(seconds * watch.early_share)
    except TimeoutError as error:
        if isinstance(error, RayTaskError):  # a worker's own: here nothing has lasted
            raise
        watch.told.add(phase)
        if file := _stacks(phase):
            watch.note(f"{phase} lasts more than {seconds * watch.early_share:g} s; what every process does is in {file}")
    return wait(max(0.0, end - time.monotonic()))


def late(phase: str, message: str) -> DeadlineError:
    """The error of a wait that has passed its deadline, with the stacks of all processes as they are now."""
    return DeadlineError(f"{phase}: {message}{where_stacks_are(phase)}")


def where_stacks_are(phase: str) -> str:
    """To end the message of an error with: where the stacks of all processes as they are now have been written; empty where nowhere."""
    file = _stacks(phase)
    return f"; what every process did is in {file}" if file else ""


def _stacks(phase: str) -> Path | None:
    """The file. A run must not end for want of stacks: where they cannot be had, the log says why."""
    if _watch is None:
        return None
    moment = time.strftime("%Y%m%d-%H%M%S")
    file = _watch.folder / f"stacks-{re.sub('[^a-z0-9]+', '-', phase.lower()).strip('-')}-{moment}.txt"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_stacks(file, f"{phase}, {moment}")
    except Exception as error:  # noqa: BLE001 - whatever keeps Ray or the disk from it
        logger.warning("%s: no stacks could be written: %s", phase, first_line(error))
        return None
    return file
