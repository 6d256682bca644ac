"""A command's run folder and its copy at `run.storage`."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from app.errors import ConfigError, Interrupted, StorageError, first_line

if TYPE_CHECKING:
    from app.config.recipe import Recipe
    from app.storage.mirror import Mirror


@contextmanager
def mirrored(recipe: Recipe) -> Iterator[Mirror | None]:
    """The mirror of the run folder, closed with the last changes sent; None without `run.storage`.

    Before anything is started: raises ConfigError where the URL cannot be written, CheckpointError where another run uses it. At the
    end: StorageError where it lacks something, unless the run itself failed, whose error goes first; Interrupted for Ctrl-C meanwhile.
    """
    if recipe.run.storage is None:
        yield None
        return
    mirror = _open(recipe.run.storage, Path(recipe.run.dir).absolute())
    try:
        yield mirror
    except BaseException as error:
        try:
            _close(mirror)
        except StorageError as problem:
            if mirror.lost_to is not None:
                raise problem from error  # the reason why the run was stopped
            _tell(f"storage: {problem}")
        raise
    _close(mirror)


def _close(mirror: Mirror) -> None:
    try:
        mirror.close()
    except KeyboardInterrupt as error:
        if mirror.lost_to is not None:  # it was found out by the last look, which asks this process to stop
            raise mirror.taken_over() from error
        raise Interrupted(mirror.lacking("stopped")) from error


def _open(url: str, folder: Path) -> Mirror:
    from app.storage.lease import Lease
    from app.storage.mirror import Mirror
    from app.storage.place import open_place, require_writable

    place = open_place(url)
    if place.is_local and (Path(place.root).is_relative_to(folder) or folder.is_relative_to(place.root)):
        raise ConfigError(f"run.storage = {url}: lies in run.dir = {folder}, or around it; choose two separate places")
    require_writable(place)
    holders: list[Mirror] = []

    def lost(holder: str) -> None:
        for mirror in holders:
            mirror.lose(holder)
        os.kill(os.getpid(), signal.SIGTERM)  # the run stops at its next safe point

    try:
        lease = Lease.acquire(place, lost, _tell)
    except OSError as error:
        raise ConfigError(f"run.storage = {url}: does not answer any more ({first_line(error)}); try again") from error
    holders.append(Mirror(place, lease, _tell))
    return holders[0]


def _tell(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
