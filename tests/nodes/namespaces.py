"""A network of machines on one: each node is a Linux network namespace with an address, a loopback and a temporary folder of its own.

As on real machines, the host's name resolves to the loopback, and a port or a Unix socket of one node is nothing to another. There is no
route out. Needs root and `ip` of iproute2.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

SUBNET = "10.77.0"
INTERFACE = "eth0"
LOG = "commands.log"
SECONDS = 90.0


def ip(*words: str) -> str:
    """Raises subprocess.CalledProcessError."""
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


@dataclass(frozen=True)
class Node:
    """One namespace. folder: backs the path that all nodes know as `temporary`; cable: the end of its link at the switch."""

    name: str
    namespace: str
    cable: str
    address: str
    folder: Path
    temporary: Path

    def inside(self) -> list[str]:
        """Words in front of a command that is to run on this node; the process keeps its pid."""
        mount = f'mount --bind {self.folder} {self.temporary} && exec "$@"'
        return ["ip", "netns", "exec", self.namespace, "sh", "-c", mount, "sh"]

    def run(self, words: Sequence[str], env: Mapping[str, str]) -> None:
        """Run a command to its end; what it leaves behind goes on. Raises CalledProcessError, with the output in `folder`/LOG."""
        with (self.folder / LOG).open("ab") as out:
            subprocess.run([*self.inside(), *words], env=dict(env), stdout=out, stderr=out, check=True, timeout=SECONDS)

    def pids(self) -> list[int]:
        return [int(pid) for pid in ip("netns", "pids", self.namespace).split()]

    def actors(self) -> dict[int, str]:
        """pid -> class of Ray's actors here, or name of a task."""
        titles = {pid: re.match(r"ray::(\w+)", _title(pid)) for pid in self.pids()}
        return {pid: title[1] for pid, title in titles.items() if title}

    def pid_of(self, program: str) -> int:
        """The one process here whose command line names `program`."""
        (pid,) = [pid for pid in self.pids() if program in _title(pid).split(" ")[0]]
        return pid

    def unplug(self) -> None:
        """Pull the cable: nothing is refused any more, it is lost."""
        ip("link", "set", self.cable, "down")

    def kill(self) -> None:
        """End every process at once, as a power cut does."""
        end = time.monotonic() + SECONDS
        while pids := self.pids():
            assert time.monotonic() < end, f"{self.name}: {pids} do not end"
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.1)


class Network:
    """A switch with nodes; `close` leaves nothing behind."""

    def __init__(self, folder: Path) -> None:
        """folder: with a short path, because of the length of Unix sockets' names. Raises CalledProcessError where none can be made."""
        self._folder, self._switch, self.nodes = folder, f"cn{os.getpid()}", list[Node]()
        self._open = ExitStack()
        self.temporary = folder / "ray"
        self.temporary.mkdir()
        ip("link", "add", self._switch, "type", "bridge")
        self._open.callback(ip, "link", "delete", self._switch)
        ip("link", "set", self._switch, "up")

    def add(self, name: str) -> Node:
        number = len(self.nodes) + 1
        namespace, cable = f"{self._switch}-{name}", f"{self._switch}-{number}"
        node = Node(name, namespace, cable, f"{SUBNET}.{number}", self._folder / name, self.temporary)
        node.folder.mkdir()
        ip("netns", "add", namespace)
        self._open.callback(self._remove, node)
        ip("link", "add", cable, "type", "veth", "peer", "name", INTERFACE, "netns", namespace)
        ip("link", "set", cable, "master", self._switch, "up")
        ip("-n", namespace, "address", "add", f"{node.address}/24", "dev", INTERFACE)
        for interface in ("lo", INTERFACE):
            ip("-n", namespace, "link", "set", interface, "up")
        self.nodes.append(node)
        return node

    def _remove(self, node: Node) -> None:
        node.kill()
        ip("link", "delete", node.cable)
        ip("netns", "delete", node.namespace)

    def close(self) -> None:
        self._open.close()


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except (FileNotFoundError, ProcessLookupError):
        return ""
