"""Waiting for what another thread or process does."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

SECONDS = 60.0


def wait_until(
    happened: Callable[[], object],
    what: str = "what was to happen",
    *,
    seconds: float = SECONDS,
    pause: float = 0.02,
    process: subprocess.Popen[bytes] | None = None,
    log: Path | None = None,
) -> None:
    """Return as soon as `happened()` is true, which is asked every `pause` seconds. Fails after `seconds`, and when the process that
    should make it happen ends first; what it has said by then is in `log`."""
    end = time.monotonic() + seconds
    while not happened():
        assert process is None or process.poll() is None, f"the process ended before {what}{_said(log)}"
        assert time.monotonic() < end, f"waited {seconds:g} s in vain for {what}{_said(log)}"
        time.sleep(pause)


def _said(log: Path | None) -> str:
    return "" if log is None else f":\n{log.read_text()}"
