"""Which process something belongs to, whether it still runs, and which code it runs."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import socket
import subprocess
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


def ray_job() -> str | None:
    """The submission id of the Ray job that this process is the driver of, or None."""
    config = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    return (config.get("metadata") or {}).get("job_submission_id")


def code_version() -> str:
    """`git describe` of the checkout that this code runs from, else the version of the installed distribution."""
    root = Path(__file__).resolve().parents[1]
    described = _git_describe(root) if (root / ".git").exists() else None
    if described:
        return described
    try:
        return importlib.metadata.version("corral-rlhf")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"  # a working_dir that was shipped to a cluster without being installed


def _git_describe(root: Path) -> str | None:
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--tags"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None  # no git on this machine, or a checkout that belongs to another user
