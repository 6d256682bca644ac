"""Checkpoints that cannot be half there.

Layout: `FOLDER/step-00000050/` holds the parts and, written last, `manifest.json` (step, state, size and SHA-256 of every part).
A checkpoint is written under a temporary name and renamed when it is complete; older ones go only after that. Which one is
the latest is computed from the manifests: there is no pointer that could lie.

A training does only the writing of the parts between two steps; `OverlappedCheckpoints` syncs, hashes and commits them beside the next.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from app.background import in_thread
from app.durable import damage, file_hashes, read_json, sync, sync_tree, write_json, writing
from app.errors import CheckpointError, DeadlineError
from app.run_layout import MANIFEST

logger = logging.getLogger(__name__)

UNWRITTEN = "make it writable; the same command goes on from the last complete checkpoint"
"""What to do about a disk on which a checkpoint finds no room, beside freeing some."""

PREFIX = "step-"
SAVING = ".saving-"
REMOVING = ".removing-"


class SavedCheckpoint(NamedTuple):
    """`state` is what `save` was given; `path` holds the parts that its `write` wrote."""

    step: int
    state: dict[str, Any]
    path: Path


def read_checkpoint(path: Path) -> SavedCheckpoint | None:
    """The checkpoint in this folder, or None, with a warning, where it is missing, cut or changed, or goes while it is read."""
    try:
        return _read(path)
    except FileNotFoundError as error:
        logger.warning("checkpoint %s has gone while it was read and is passed over: %s", path, error)
        return None


def _read(path: Path) -> SavedCheckpoint | None:
    if not (path / MANIFEST).is_file():
        logger.warning("checkpoint %s has no manifest and is passed over", path)
        return None
    try:
        manifest = read_json(path / MANIFEST)
        step, state, files = manifest["step"], manifest["state"], manifest["files"]
    except (CheckpointError, KeyError) as error:
        logger.warning("checkpoint %s has an unreadable manifest and is passed over: %s", path, error)
        return None
    if problem := damage(path, files):
        logger.warning("checkpoint %s is passed over: %s", path, problem)
        return None
    return SavedCheckpoint(step, state, path)


@contextmanager
def _removed_on_failure(partial: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError):
        shutil.rmtree(partial, ignore_errors=True)  # on a full disk it would be in the way of everything else
        raise


class CheckpointStore:
    """The checkpoints of one stage, of which the newest `keep` stay. One writer at a time."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep = {keep}: at least one checkpoint must stay")
        self.folder = folder
        self.keep = keep

    def save(self, step: int, state: Mapping[str, Any], write: Callable[[Path], None]) -> Path:
        """Commit a checkpoint and return its folder.

        `state`: small and JSON-able (counters, coefficients, RNG states as lists), finite. `write(folder)` puts the large
        parts there, by whichever processes, and returns when all of them are closed. If anything raises, the earlier
        checkpoints stay as they were. Raises DiskError where the disk is full or cannot be written to.
        """
        return self.stage(step, state, write)()

    def stage(self, step: int, state: Mapping[str, Any], write: Callable[[Path], None]) -> Callable[[], Path]:
        """`save` in two: the parts are written when it returns, and what `write` wrote from may change. What it returns does the rest."""
        state, saved = dict(state), time.time()
        with self._writing(step):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._clear_leftovers()
            final = self._free_name(step)
            partial = self.folder / f"{SAVING}{final.name}"
            partial.mkdir()
            with _removed_on_failure(partial):
                write(partial)

        def commit() -> Path:
            with self._writing(step):
                with _removed_on_failure(partial):
                    sync_tree(partial)
                    write_json(partial / MANIFEST, {"step": step, "state": state, "saved": saved, "files": file_hashes(partial)})
                partial.rename(final)
                sync(self.folder)
                self._retire(final)
            return final

        return commit

    def latest(self) -> SavedCheckpoint | None:
        """The newest complete checkpoint, or None where there is none at all. One whose parts are missing, cut or changed is passed over
        with a warning. Raises CheckpointError where none is complete, or they cannot be read: starting over is not for a program to
        decide."""
        try:
            return self._latest()
        except OSError as error:
            raise CheckpointError(f"{self.folder}: cannot be read ({error.strerror}): mend that, and the same command goes on") from error

    def _latest(self) -> SavedCheckpoint | None:
        folders = self._folders()
        for path in folders:
            if saved := read_checkpoint(path):
                return saved
        if folders != self._folders():  # a run that works there has replaced them meanwhile
            return self._latest()
        if folders:
            raise CheckpointError(
                f"{self.folder}: {folders[0].name} and all older checkpoints are damaged: restore one of them, "
                "or delete the folder to start this stage over"
            )
        return None

    def _writing(self, step: int) -> AbstractContextManager[None]:
        return writing(f"{self.folder}: the checkpoint of step {step}", UNWRITTEN)

    def _folders(self) -> list[Path]:
        """Newest first; a step saved again sorts above its older copy. Raises OSError where they cannot be listed, of which `glob` would
        say that there are none."""
        try:
            found = list(self.folder.iterdir())
        except FileNotFoundError:
            return []
        return sorted((p for p in found if p.name.startswith(PREFIX) and p.is_dir()), reverse=True)

    def _free_name(self, step: int) -> Path:
        """A step saved again (after a resume) gets a name of its own, so that the earlier copy stays until this one is complete."""
        name = f"{PREFIX}{step:08d}"
        copies = [int(p.name.partition(".")[2] or 0) for p in self.folder.glob(f"{name}*")]
        return self.folder / (f"{name}.{max(copies) + 1:03d}" if copies else name)

    def _retire(self, newest: Path) -> None:
        """Drop all but `keep`. What a resume left behind it (later steps than the one just saved) goes first."""
        folders = self._folders()
        first = folders.index(newest)
        for path in folders[:first] + folders[first + self.keep :]:
            doomed = self.folder / f"{REMOVING}{path.name}"
            path.rename(doomed)  # in one step: a half-deleted folder must not look like a checkpoint
            shutil.rmtree(doomed)

    def _clear_leftovers(self) -> None:
        for pattern in (f"{SAVING}*", f"{REMOVING}*"):
            for path in self.folder.glob(pattern):
                shutil.rmtree(path)


class OverlappedCheckpoints:
    """A store that commits a checkpoint while its caller goes on, one at a time; at the end of the `with` block nothing is under way.

    Where a block ends with an error, that of a commit is logged, so as not to hide it.
    """

    def __init__(self, store: CheckpointStore, *, deadline_seconds: float) -> None:
        self._store, self._deadline_seconds = store, deadline_seconds
        self._commit: Future[Path] | None = None
        self._late = False

    def __enter__(self) -> OverlappedCheckpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.settle(wait_for_it=not self._late)  # one deadline is enough
        except Exception as failure:
            if error is None:
                raise
            logger.error("%s", failure)

    def save(self, step: int, state: Mapping[str, Any], write: Callable[[Path], None]) -> None:
        """As `CheckpointStore.save`, of which only the writing of the parts is waited for, and the commit before. Raises what either
        raises, and DeadlineError."""
        self.settle()
        self._commit = in_thread(self._store.stage(step, state, write), "corral-checkpoint")

    def settle(self, *, wait_for_it: bool = True) -> None:
        """Raise what the commit under way has raised, after waiting for its end if wanted. Raises DeadlineError where it has none."""
        if self._commit is None:
            return
        if not wait([self._commit], timeout=self._deadline_seconds if wait_for_it else 0).done:
            if wait_for_it:
                self._late = True
                raise DeadlineError(
                    f"{self._store.folder}: a checkpoint is not on the disk after {self._deadline_seconds:g} s: look what keeps the disk "
                    "from writing, or raise run.deadline_seconds; the same command goes on from the last complete checkpoint"
                )
            return
        commit, self._commit = self._commit, None
        commit.result()
