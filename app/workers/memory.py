"""Peak memory of a whole run: the proportional set size (PSS) of its process tree, sampled each second.

PSS divides every shared page among the processes that map it, so that the sum over processes counts Ray's object store and
shared libraries once; a sum of RSS would count them once per worker. Linux only (`/proc/PID/smaps_rollup`).

Reading a PSS walks the process's page tables (about 15 ms per GiB), so most samples read only the RSS, which costs
microseconds: the sum of PSS cannot have grown by more than the RSS of the processes has, and where even that growth would
not reach the peak, the peak stands.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import psutil
import ray

PROC = Path("/proc")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def process_tree(roots: Iterable[int]) -> set[int]:
    """`roots` and all their living descendants."""
    children: dict[int, list[int]] = {}
    with os.scandir(PROC) as entries:
        pids = [int(entry.name) for entry in entries if entry.name.isdigit()]
    for pid in pids:
        if (parent := _parent(pid)) is not None:
            children.setdefault(parent, []).append(pid)
    found: set[int] = set()
    waiting = list(roots)
    while waiting:
        pid = waiting.pop()
        if pid not in found:
            found.add(pid)
            waiting.extend(children.get(pid, []))
    return found


def _parent(pid: int) -> int | None:
    try:
        stat = (PROC / str(pid) / "stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None  # it ended since the listing
    return int(stat.rpartition(b")")[2].split()[1])  # the name before ")" may hold spaces and brackets


def proportional_bytes(pid: int) -> int:
    """PSS of one process in bytes; 0 once it has ended; its RSS where another user's process hides its PSS."""
    try:
        rollup = (PROC / str(pid) / "smaps_rollup").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    except PermissionError:
        return resident_bytes(pid)
    for line in rollup.splitlines():
        if line.startswith(b"Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def resident_bytes(pid: int) -> int:
    """RSS of one process in bytes; 0 once it has ended."""
    try:
        return int((PROC / str(pid) / "statm").read_bytes().split()[1]) * PAGE_BYTES
    except (FileNotFoundError, ProcessLookupError):
        return 0


def raylet_pids() -> set[int]:
    """The raylets on this machine of the Ray that this process is connected to: the roots of its worker processes."""
    session = ray._private.worker.global_worker.node.get_session_dir_path()
    found = set()
    for process in psutil.process_iter(["name", "cmdline"]):
        if process.info["name"] == "raylet" and any(session in word for word in process.info["cmdline"] or ()):
            found.add(process.pid)
    return found


class PeakMemory:
    """Context manager; `peak_bytes` is the largest sum seen so far, `peak_processes` how many processes made it up.

    `extra_roots`: process ids whose trees count too, for a Ray that this process did not start (its raylet): the workers
    of such a Ray are not our children. Only processes of this machine are seen.
    """

    def __init__(self, extra_roots: Iterable[int] = (), interval_seconds: float = 1.0) -> None:
        self.peak_bytes = 0
        self.peak_processes = 0
        self._roots = {os.getpid(), *extra_roots}
        self._last_total = 0
        self._last_resident: dict[int, int] = {}
        self._interval = interval_seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)

    def sample(self) -> int:
        """Summed PSS now, bytes; raises the peak where it is higher."""
        resident = {pid: resident_bytes(pid) for pid in process_tree(self._roots)}
        total = sum(map(proportional_bytes, resident))
        if total > self.peak_bytes:
            self.peak_bytes, self.peak_processes = total, len(resident)
        self._last_total, self._last_resident = total, resident
        return total

    def sample_if_higher(self) -> None:
        """Like `sample`, without the walk over page tables where the peak cannot have been passed since the last one."""
        growth = sum(max(0, resident_bytes(pid) - self._last_resident.get(pid, 0)) for pid in process_tree(self._roots))
        if self._last_total + growth > self.peak_bytes:
            self.sample()

    def _watch(self) -> None:
        while not self._stop.is_set():
            self.sample_if_higher()
            self._stop.wait(self._interval)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
