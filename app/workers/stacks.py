"""What every process of a run is doing: the stacks of all its threads, on request.

A process that waits in C (a collective, a read, a lock) runs no Python. Its stacks are written by faulthandler's handler of SIGUSR1,
which needs neither the interpreter nor a debugger's rights. A process has to be told once (`write_stacks_on_signal`); it then keeps a
file open in the folder of Ray's session on its node, and the file's name says which process may be sent the signal. One that was not
told would end by it.
"""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import socket
import tempfile
import time
from pathlib import Path
from typing import IO, Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

NODE_SECONDS = 20.0
"""For the answers of all nodes: a process may have to start there to collect them."""

SETTLE_SECONDS, LOOK_SECONDS = 2.0, 0.05
"""A process writes its stacks within milliseconds of the signal; one that the kernel has stopped writes none."""

_open_file: IO[bytes] | None = None  # the handler writes to its descriptor: it must stay open


def write_stacks_on_signal(role: str) -> None:
    """Let SIGUSR1 write the stacks of all threads of this process to its file, from now on. Outside of Ray nobody would ask for them."""
    global _open_file
    if _open_file is not None or not ray.is_initialized():
        return
    folder = stacks_folder()
    folder.mkdir(parents=True, exist_ok=True)
    pid = os.getpid()
    private = folder / f".{pid}"
    _open_file = private.open("ab")
    faulthandler.register(signal.SIGUSR1, file=_open_file, all_threads=True)
    private.rename(folder / f"{pid}@{_started(pid)}@{re.sub('[^a-z0-9 ]', '-', role.lower())}")  # from now on the signal may come


def stacks_folder() -> Path:
    """Of this node of this Ray."""
    session = ray._private.worker.global_worker.node.get_session_dir_path()
    return Path(session) / "stacks" / ray.get_runtime_context().get_node_id()


def stacks_of_node(folder: Path | None = None) -> str:
    """The stacks of all living processes of this node that write them on a signal, each under a headline."""
    asked: dict[Path, tuple[str, int]] = {}  # headline, length of what earlier signals have left
    for file in sorted((folder or stacks_folder()).glob("*@*@*")):
        pid, started, role = file.name.split("@", 2)
        if _started(int(pid)) != started:  # it has ended, and its number may be another's now
            file.unlink(missing_ok=True)  # somebody else may be collecting
            continue
        length = _size(file)
        try:
            os.kill(int(pid), signal.SIGUSR1)
        except ProcessLookupError:  # it ends at this moment
            continue
        asked[file] = f"==== {role}, process {pid} on {socket.gethostname()} ====", length
    _wait_until_written({file: length for file, (_, length) in asked.items()})
    silent = "nothing written: the process is stopped, or in the kernel\n"
    return "\n".join(f"{headline}\n{_from(file, length) or silent}" for file, (headline, length) in asked.items())


def write_stacks(file: Path, headline: str) -> None:
    """Collect the stacks of this process and of all processes on all nodes into `file`. What cannot be had is named there."""
    collect = ray.remote(num_cpus=0)(stacks_of_node)
    nodes: dict[Any, str] = {}
    for node in ray.nodes():
        if node["Alive"]:
            place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            nodes[collect.options(scheduling_strategy=place).remote()] = node["NodeManagerAddress"]
    ray.wait(list(nodes), num_returns=len(nodes), timeout=NODE_SECONDS)
    with file.open("w", encoding="utf-8") as out:
        out.write(f"{headline}\n\n==== the waiting process, {os.getpid()} on {socket.gethostname()} ====\n{own_stacks()}\n")
        for answer, address in nodes.items():
            try:
                out.write(ray.get(answer, timeout=0) + "\n")
            except ray.exceptions.RayError as error:
                out.write(f"==== node {address}: {type(error).__name__} ====\n")


def own_stacks() -> str:
    """Of all threads of this process."""
    with tempfile.TemporaryFile() as file:  # faulthandler wants a descriptor
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().decode(errors="replace")


def _started(pid: int) -> str | None:
    """When the process started, in ticks since the machine did; None where there is none of this number."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return stat.rpartition(")")[2].split()[19]  # the name before ")" may hold anything


def _wait_until_written(lengths: dict[Path, int]) -> None:
    """Until all have written something and nobody goes on writing."""
    end, before = time.monotonic() + SETTLE_SECONDS, dict[Path, int]()
    while time.monotonic() < end:
        time.sleep(LOOK_SECONDS)
        now = {file: _size(file) for file in lengths}
        if now == before and all(now[file] > length for file, length in lengths.items()):
            return
        before = now


def _size(file: Path) -> int:
    """0 also where another collector has removed it, because its process has ended since."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


def _from(file: Path, start: int) -> str:
    try:
        with file.open("rb") as content:
            content.seek(start)
            return content.read().decode(errors="replace")
    except FileNotFoundError:  # see `_size`
        return ""
