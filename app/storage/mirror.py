"""A run folder kept at a URL too (`run.storage`), so that the run goes on from there on another machine.

The URL has the layout of the folder and its rule: a manifest comes last and describes what is complete. So whatever moment either
side dies at, a checkpoint or a finished stage is whole there or does not count.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from app.errors import StorageError, first_line
from app.run_layout import BEST_MODEL, HELD_OUT_METRICS, MANIFEST, SEARCH
from app.storage.filling import THREADS, fill, write_index
from app.storage.lease import Lease
from app.storage.mirrored_files import (
    CHECKPOINT_FOLDERS,
    Stamp,
    checkpoint_of,
    is_search_record,
    is_tracked,
    order,
    rank,
    stamp_or_none,
    tracked,
)
from app.storage.place import Place

POLL_SECONDS, FLUSH_SECONDS = 2.0, 60.0
"""Between two looks for a new manifest, and the longest time that metrics wait when there is none."""
RETRY_SECONDS = (1.0, 5.0, 20.0)


class Mirror:
    """`fill` the folder, `start` to follow it, `close` at the end of the run. `tell` hears what a person should know."""

    def __init__(self, place: Place, lease: Lease | None, tell: Callable[[str], object] = lambda text: None) -> None:
        self.place, self._lease, self._tell = place, lease, tell
        self.lost_to: str | None = None
        self._path = Path()
        self._sent: dict[str, Stamp] = {}
        self._pushing = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="corral-storage", daemon=True)
        self._pushed = 0.0
        self._failing = False

    def fill(self, path: Path, identity: Mapping[str, Any]) -> None:
        """Bring the run's local folder to what the URL holds, unless it is as far or further. Only what is needed to go on is fetched.

        Raises CheckpointError where the URL holds a run of another configuration, or another run than the folder, and StorageError.
        """
        self._path = path
        try:
            self._sent = fill(path, self.place, identity, self._tell)
        except OSError as error:
            raise StorageError(
                f"{self.place.url}: the run cannot be fetched ({first_line(error)}); the same command tries again"
            ) from error

    def start(self, path: Path) -> None:
        """Send what the URL lacks, and follow the folder from now on. Raises StorageError."""
        self._path = path
        self._push_at_last()
        self._thread.start()

    def push(self) -> None:
        """Send every change, manifests and what a search goes on from last, then delete there what is gone here. Raises OSError."""
        with self._pushing:
            # looked at anew: a machine that slept may find what another run has left since
            if self.lost_to is None and (self._lease is None or self._lease.is_held()):
                self._push()
                self._pushed = time.monotonic()

    def lose(self, holder: str) -> None:
        """Send nothing any more: the URL belongs to another process."""
        self.lost_to = holder

    def close(self) -> None:
        """Send the last changes and free the URL. Raises StorageError where that does not work."""
        self._stop.set()
        try:
            if self._thread.ident is not None:  # else the folder may not be this run's
                self._thread.join()
                self._push_at_last()
        finally:
            self._release()
        if self.lost_to is not None:
            raise self.taken_over()

    def taken_over(self) -> StorageError:
        """What to raise once the URL is another's."""
        return StorageError(
            f"{self.lost_to} took {self.place.url} over, so this run was stopped: what it did since is only in {self._path}; "
            "make sure that one run at a time uses a run.storage"
        )

    def lacking(self, reason: str) -> str:
        """What to say where the last changes could not be sent."""
        return f"{self.place.url} lacks the last changes of {self._path} ({reason}): the same command sends them"

    def _push_at_last(self) -> None:
        for pause in (*RETRY_SECONDS, None):
            try:
                self.push()
                return
            except OSError as error:
                if pause is None:
                    raise StorageError(f"{self.lacking(first_line(error))} when it works again") from error
                time.sleep(pause)

    def _release(self) -> None:
        if self._lease is None:
            return
        try:
            self._lease.release()
        except OSError as error:
            self._tell(f"storage: {self.place.url} stays marked as in use for a minute ({first_line(error)})")

    def _follow(self) -> None:
        known: dict[str, Stamp] = {}
        while not self._stop.wait(POLL_SECONDS):
            try:
                now = self._manifests()
                if now == known and time.monotonic() - self._pushed < FLUSH_SECONDS:
                    continue
                self.push()
                known = now
                self._say(failing=False)
            except OSError as error:
                self._say(failing=True, reason=first_line(error))

    def _say(self, *, failing: bool, reason: str = "") -> None:
        """Once when sending begins to fail, and once when it works again."""
        if failing and not self._failing:
            self._tell(f"storage: {self.place.url} cannot be written ({reason}); trying again")
        elif self._failing and not failing:
            self._tell(f"storage: {self.place.url} is written again")
        self._failing = failing

    def _push(self) -> None:
        manifests = self._manifests()  # before the rest: what a manifest describes is then surely among the files
        records = self._search_records()  # for the same reason
        files = {name: stamp for name, stamp in tracked(self._path) if not is_search_record(name)}
        files |= {name: stamp for name, (stamp, _) in records.items()}
        changed = [name for name, stamp in files.items() if self._sent.get(name) != stamp]
        best = [name for name in changed if PurePosixPath(name).parent.name == BEST_MODEL]
        for folder in sorted({str(PurePosixPath(name).parent) for name in best}):
            self.place.delete(f"{folder}/{HELD_OUT_METRICS}")  # without it a half-sent model does not count
        parts = [name for name in changed if rank(name) == 0]
        with ThreadPoolExecutor(THREADS) as pool:
            arrived = dict(zip(parts, pool.map(lambda name: self._send(name, files[name]), parts), strict=True))
        gone = [name for name, done in arrived.items() if not done]
        committed = []
        for name in sorted((name for name in changed if rank(name)), key=order):
            if name in records:
                self.place.write(name, records[name][1])
                self._sent[name] = files[name]
                continue
            folder = str(PurePosixPath(name).parent)
            torn = folder != "." and any(other.startswith(f"{folder}/") for other in gone)
            if not torn and (rank(name) == 1 or manifests.get(name) == files[name]) and self._commit(name, files[name]):
                committed.append(name)
        self._forget(files, committed)
        with suppress(OSError):  # a full disk here; an old index only has more sent again
            write_index(self._path, self.place, self._sent)

    def _send(self, name: str, stamp: Stamp) -> bool:
        """False where the file has changed or gone since it was listed; the next push sees what took its place."""
        source = self._path / name
        if stamp_or_none(source) != stamp:
            return False
        try:
            self.place.put(source, name)
        except OSError:
            if source.is_file():
                raise
        if stamp_or_none(source) != stamp:
            return False
        self._sent[name] = stamp
        return True

    def _commit(self, name: str, stamp: Stamp) -> bool:
        """`_send` of a small file that describes others: as it was when it was listed, or not at all, and till then the URL keeps its own.

        Without the run's manifest it would hold no run, and the next start elsewhere would begin anew.
        """
        try:
            content = (self._path / name).read_bytes()
        except FileNotFoundError:
            return False
        if stamp_or_none(self._path / name) != stamp:
            return False
        self.place.write(name, content)
        self._sent[name] = stamp
        return True

    def _forget(self, files: Mapping[str, Stamp], committed: Sequence[str]) -> None:
        """Delete at the URL what was sent and is gone here, and checkpoints that a newer one has replaced: none before that has arrived."""
        here = {folder.parent for name in files if (folder := checkpoint_of(name))}
        arrived = {folder.parent for name in self._sent if name in files and rank(name) and (folder := checkpoint_of(name))}
        gone = [
            name
            for name in self._sent
            if name not in files
            and not (self._path / name).exists()
            and not ((folder := checkpoint_of(name)) and folder.parent in here - arrived)
        ]
        for name in sorted(gone, key=lambda name: -rank(name)):  # manifests first: what is left of their folders does not count
            self.place.delete(name)
            del self._sent[name]
        for checkpoints in sorted({str(folder.parent) for name in committed if (folder := checkpoint_of(name))}):
            for checkpoint in self.place.inside(checkpoints).folders():
                if not (self._path / checkpoints / checkpoint).is_dir():
                    self.place.delete(f"{checkpoints}/{checkpoint}/{MANIFEST}")
                    self.place.delete_folder(f"{checkpoints}/{checkpoint}")

    def _manifests(self) -> dict[str, Stamp]:
        """Every manifest of the folder as it is now."""
        found = {}
        for pattern in (MANIFEST, f"*/{MANIFEST}", *(f"{folder}/{MANIFEST}" for folder in CHECKPOINT_FOLDERS)):
            for path in self._path.glob(pattern):
                stamp = stamp_or_none(path)
                if stamp is not None:
                    found[path.relative_to(self._path).as_posix()] = stamp
        return found

    def _search_records(self) -> dict[str, tuple[Stamp, bytes]]:
        """What a search goes on from, as it is now: read in the opposite order of sending, so that whatever a file names stands in those
        that are sent before it. One that is being written waits for the next push."""
        found = {}
        names = [path.relative_to(self._path).as_posix() for path in self._path.glob(f"{SEARCH}/*") if path.is_file()]
        for name in sorted(filter(is_tracked, filter(is_search_record, names)), key=order, reverse=True):
            before = stamp_or_none(self._path / name)
            if before is not None:
                content = (self._path / name).read_bytes()
                if stamp_or_none(self._path / name) == before:
                    found[name] = (before, content)
        return found
