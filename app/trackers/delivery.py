"""Between a run and one tracking service: a thread and a buffer, so that training neither waits for the service nor fails with it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from app.errors import first_line
from app.run_layout import METRICS_FILE
from app.trackers.service import Point, TrackingService

RETRY_SECONDS = 60.0
"""Between two attempts at a service that fails."""
CLOSE_SECONDS = 30.0
"""How long the end of a session waits for a service."""


class Delivery:
    """Points go to the service in order. What it does not take is kept and offered again; one note tells of the first failure."""

    def __init__(self, name: str, service: TrackingService, note: Callable[[str], None]) -> None:
        self._name, self._service, self._note = name, service, note
        self._changed = threading.Condition()
        self._pending: list[Point] = []
        self._failed: bool | None = None  # how the session ended; None while it goes on
        self._told = False
        self._thread = threading.Thread(target=self._work, name=f"corral-{name}", daemon=True)
        self._thread.start()

    def log(self, point: Point) -> None:
        """Take a point; returns at once."""
        with self._changed:
            self._pending.append(point)
            self._changed.notify()

    def close(self, *, failed: bool) -> None:
        """Deliver the rest and end the run on the service, within CLOSE_SECONDS."""
        with self._changed:
            self._failed = failed
            self._changed.notify()
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self._note(f"{self._name}: does not answer, the end of the run may be missing there")
        elif self._pending:
            self._note(f"{self._name}: {len(self._pending)} logged points have not arrived there; {METRICS_FILE} has all of them")

    def _work(self) -> None:
        retry_at = 0.0
        while True:
            points, failed = self._wait(retry_at)
            if points and self._attempt(lambda: self._service.log(points)):  # noqa: B023 - called before the next turn
                retry_at = 0.0
                with self._changed:
                    del self._pending[: len(points)]
            elif points:
                retry_at = time.monotonic() + RETRY_SECONDS
            if failed is not None:
                break
        self._attempt(lambda: self._service.close(failed=failed))

    def _wait(self, retry_at: float) -> tuple[list[Point], bool | None]:
        """Until there is something to offer, not before `retry_at` (time.monotonic), or the session ends."""
        with self._changed:
            while self._failed is None and (not self._pending or time.monotonic() < retry_at):
                self._changed.wait(retry_at - time.monotonic() if self._pending else None)
            return list(self._pending), self._failed

    def _attempt(self, call: Callable[[], None]) -> bool:
        try:
            call()
        except Exception as error:  # noqa: BLE001 - whatever the service's library raises; training goes on
            if not self._told:
                self._told = True
                self._note(f"{self._name}: not reached ({reason(error)}); training goes on, and {METRICS_FILE} has every metric")
            return False
        return True


def reason(error: Exception) -> str:
    """The type of an error and the first line of its message."""
    return f"{type(error).__name__}: {first_line(error)[:200]}"
