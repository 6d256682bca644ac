"""Which process something belongs to, and whether it still runs."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import psutil


def host_name() -> str:
    """What this host is called in a record."""
    return socket.gethostname()


def me() -> dict[str, Any]:
    """Where a process is that a record belongs to, and which; `process_started` tells it from a later process with the same number."""
    return _here() | {"pid": os.getpid(), "process_started": psutil.Process().create_time()}


def runs_here(record: Mapping[str, Any]) -> bool | None:
    """Whether the process of a record of `me` still runs; None where it was on another host, or in another container of this one."""
    known = {"host": None} | dict(record)
    if "pid" not in known or any(known[key] != value for key, value in _here().items() if key in known):
        return None
    try:
        process = psutil.Process(int(record["pid"]))
        same = abs(process.create_time() - float(record["process_started"])) < 1.0
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _here() -> dict[str, Any]:
    """What a number of a process is good for: names of hosts are given twice, and a container may have its machine's name."""
    return {"host": host_name(), "machine": _machine(), "pid_namespace": str(Path("/proc/self/ns/pid").readlink())}


@cache
def _machine() -> str | None:
    """The same as long as this system is installed, over restarts. Hashed, as the file itself should not be shown to others."""
    try:
        return hashlib.sha256(b"corral" + Path("/etc/machine-id").read_bytes().strip()).hexdigest()[:16]
    except OSError:
        return None
