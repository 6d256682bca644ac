"""One run at a time behind a URL: a small file there that its holder renews.

A lease that nobody has renewed for EXPIRY_SECONDS, by the clock of the one who waits for it, is given up: no two clocks are compared.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from app.errors import CheckpointError
from app.process_record import me, runs_here
from app.storage.place import Place

NAME = ".lease.json"
RENEW_SECONDS, EXPIRY_SECONDS = 15.0, 60.0
SETTLE_SECONDS = 1.0
"""Between writing a new lease and reading it again: of two that write at once, the later one wins."""
LOOK_SECONDS = 2.0


class Lease:
    """Make one with `acquire`. `lost` is called once, in any thread, when another process has taken the lease over."""

    def __init__(self, place: Place, record: dict[str, Any], lost: Callable[[str], None]) -> None:
        self._place, self._record, self._lost = place, record, lost
        self._stop = threading.Event()
        self._looking, self._taken = threading.RLock(), False
        self._thread = threading.Thread(target=self._keep, name="corral-lease", daemon=True)

    @classmethod
    def acquire(cls, place: Place, lost: Callable[[str], None], wait: Callable[[str], object] = lambda text: None) -> Lease:
        """The lease of a place, renewed from now on. `wait` hears why it takes a minute, where a holder may have died.

        Raises CheckpointError where another run holds it, OSError where the place does not answer.
        """
        before = _read(place)
        if before is not None and not _is_dead(before):
            wait(f"{place.url} was last used by {_holder(before)}; waiting {EXPIRY_SECONDS:g} s to see whether that still runs")
            _wait_out(place, before)
        record = {"token": uuid.uuid4().hex, "count": 0, "started": time.time(), **me()}
        place.write(NAME, json.dumps(record).encode())
        time.sleep(SETTLE_SECONDS)
        now = _read(place)
        if now is None or now["token"] != record["token"]:
            raise _in_use(place, now)
        lease = cls(place, record, lost)
        lease._thread.start()
        return lease

    def is_held(self) -> bool:
        """Whether the lease is still this process's. One that is gone is not: only a run that has taken it over gives it back.

        Raises OSError.
        """
        with self._looking:
            if self._taken:
                return False
            content = self._place.read(NAME)
            now = _parsed(content)
            self._taken = content is None or (now is not None and now["token"] != self._record["token"])
            if self._taken:
                self._lost("another process, which has ended since," if now is None else _holder(now))
            return not self._taken

    def renew(self) -> bool:
        """Write the lease again; False, with nothing written, where it is another's now. Raises OSError."""
        with self._looking:
            if not self.is_held():
                return False
            self._record["count"] += 1
            self._place.write(NAME, json.dumps(self._record).encode())
            return True

    def release(self) -> None:
        """Give the lease back, where it is still held. Raises OSError."""
        self._stop.set()
        self._thread.join()
        now = _read(self._place)
        if now is not None and now["token"] == self._record["token"]:
            self._place.delete(NAME)

    def _keep(self) -> None:
        while not self._stop.wait(RENEW_SECONDS):
            try:
                if not self.renew():
                    return
            except OSError:
                continue  # the next try may work; if none does, another run may take over, and the one after that tells


def _wait_out(place: Place, before: dict[str, Any]) -> None:
    """Returns when the lease has not been renewed for EXPIRY_SECONDS, or is gone. Raises CheckpointError once it is renewed."""
    end = time.monotonic() + EXPIRY_SECONDS
    while time.monotonic() < end:
        time.sleep(min(LOOK_SECONDS, EXPIRY_SECONDS))
        now = _read(place)
        if now is None:
            return
        if now != before:
            raise _in_use(place, now)


def _is_dead(record: dict[str, Any]) -> bool:
    return runs_here(record) is False


def _in_use(place: Place, record: dict[str, Any] | None) -> CheckpointError:
    holder = _holder(record) if record is not None else "another process"
    return CheckpointError(f"{place.url} is in use by {holder}: wait for it to end, stop it, or choose another run.storage")


def _holder(record: dict[str, Any]) -> str:
    return f"process {record.get('pid')} on {record.get('host')}"


def _read(place: Place) -> dict[str, Any] | None:
    """The lease, or None."""
    return _parsed(place.read(NAME))


def _parsed(content: bytes | None) -> dict[str, Any] | None:
    """The lease, or None. One that was cut short counts as nobody's."""
    try:
        record = json.loads(content or b"null")
    except ValueError:
        return None
    return record if isinstance(record, dict) and "token" in record else None
