"""Which process something belongs to, and whether it still runs."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import Any

import psutil


def me() -> dict[str, Any]:
    """Host and process that a record belongs to; `process_started` tells it from a later process with the same number."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "process_started": psutil.Process().create_time()}


def runs_here(record: Mapping[str, Any]) -> bool | None:
    """Whether the process of a record of `me` still runs; None where it was on another host."""
    if record.get("host") != socket.gethostname() or "pid" not in record:
        return None
    try:
        process = psutil.Process(int(record["pid"]))
        same = abs(process.create_time() - float(record["process_started"])) < 1.0
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
