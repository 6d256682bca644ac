"""What one machine is and has, as facts: gathered where it runs, judged elsewhere."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from app.workers.network import interfaces

SHARED_MEMORY = "/dev/shm"
NCCL_PACKAGES = "nvidia-nccl"
_GPU_QUERY = ("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits")
_CGROUP_LIMIT = Path("/sys/fs/cgroup/pids.max")
_QUERY_SECONDS = 20


@dataclass(frozen=True)
class Space:
    """Of the file system that holds `path`; free, size: bytes."""

    path: str
    free: int
    size: int


@dataclass(frozen=True)
class Gpu:
    """memory: bytes."""

    name: str
    memory: int
    driver: str


@dataclass(frozen=True)
class NodeReport:
    """One machine.

    address: by which the other nodes know it; packages: normalised name -> version; interfaces: name -> addresses; cores: that this process
    may use; threads: OMP_NUM_THREADS; task_limit: processes and threads that it may start; disks: what for -> space; gpus: that are there;
    counted_gpus: that Ray gives out.
    """

    address: str
    host: str
    python: str
    packages: Mapping[str, str]
    interfaces: Mapping[str, Sequence[str]]
    cores: int
    threads: str | None
    task_limit: int | None
    shared_memory: Space | None
    disks: Mapping[str, Space]
    gpus: tuple[Gpu, ...] = ()
    counted_gpus: float = 0.0

    @property
    def nccl(self) -> str | None:
        """The version that torch brought along; None for a torch without CUDA."""
        return next((version for name, version in sorted(self.packages.items()) if name.startswith(NCCL_PACKAGES)), None)


def this_node(address: str, disks: Mapping[str, str], counted_gpus: float = 0.0) -> NodeReport:
    """The machine that this runs on. disks: what for -> path, which need not exist yet."""
    return NodeReport(
        address=address,
        host=socket.gethostname(),
        python=platform.python_version(),
        packages=installed_packages(),
        interfaces=interfaces(),
        cores=len(os.sched_getaffinity(0)),
        threads=os.environ.get("OMP_NUM_THREADS"),
        task_limit=_task_limit(),
        shared_memory=space(SHARED_MEMORY) if Path(SHARED_MEMORY).exists() else None,
        disks={name: space(path) for name, path in disks.items()},
        gpus=_gpus(),
        counted_gpus=counted_gpus,
    )


def installed_packages() -> dict[str, str]:
    """Normalised name -> version, as this process would import them: the first on its path."""
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if name:
            found.setdefault(normalised(name), distribution.version)
    return found


def normalised(name: str) -> str:
    """A package's name as indexes compare it.

    >>> normalised("Typing_Extensions")
    'typing-extensions'
    """
    return re.sub(r"[-_.]+", "-", name).lower()


def space(path: str) -> Space:
    """Of `path`, or of the nearest folder above it that exists."""
    place = Path(path).expanduser().absolute()
    usage = shutil.disk_usage(next(each for each in (place, *place.parents) if each.exists()))
    return Space(str(place), usage.free, usage.total)


def _task_limit() -> int | None:
    limits = [resource.getrlimit(resource.RLIMIT_NPROC)[0]]
    if _CGROUP_LIMIT.is_file():
        text = _CGROUP_LIMIT.read_text().strip()
        limits += [int(text)] if text.isdigit() else []
    return min((limit for limit in limits if limit != resource.RLIM_INFINITY), default=None)


def _gpus() -> tuple[Gpu, ...]:
    """As the driver's own tool lists them: a process without GPUs of its own sees none through CUDA."""
    if shutil.which(_GPU_QUERY[0]) is None:
        return ()
    done = subprocess.run(_GPU_QUERY, capture_output=True, text=True, check=False, timeout=_QUERY_SECONDS)
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()] if done.returncode == 0 else []
    return tuple(Gpu(name, int(mebibytes) * 2**20, driver) for name, mebibytes, driver in rows if mebibytes.isdigit())
