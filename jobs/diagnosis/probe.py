"""One process on each node that reports, tells the time, connects to the others and computes a sum with them."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from app.workers.network import use_node_address
from jobs.diagnosis.node_report import NodeReport, this_node

NUMBERS = 1024  # of the vector that is summed


class NodeProbe:
    """A Ray actor, pinned to its node, which takes no CPU."""

    def __init__(self, address: str, counted_gpus: float) -> None:
        """address: by which Ray knows the node; counted_gpus: that Ray gives out there."""
        self._address, self._counted_gpus = address, counted_gpus

    def report(self, disks: Mapping[str, str]) -> NodeReport:
        return this_node(self._address, disks, self._counted_gpus)

    def clock(self) -> float:
        return time.time()

    def sees(self, path: str) -> bool:
        return Path(path).exists()

    def listen(self) -> tuple[str, int]:
        """Open a port on the node's address and take whatever connects; returns both. Raises OSError where that is no address of it."""
        server = socket.create_server((self._address, 0), backlog=128)
        threading.Thread(target=_take_all, args=(server,), daemon=True).start()
        return self._address, int(server.getsockname()[1])

    def free_port(self) -> tuple[str, int]:
        """Where the others can meet this one."""
        with socket.create_server((self._address, 0)) as server:
            return self._address, int(server.getsockname()[1])

    def reach(self, places: Sequence[tuple[str, int]], seconds: float) -> list[str | None]:
        """Connect to every place: None where it works, else why not."""
        answers: list[str | None] = []
        for place in places:
            try:
                socket.create_connection(place, timeout=seconds).close()
            except OSError as error:
                answers.append(f"{place[0]}: {error.strerror or error}")
            else:
                answers.append(None)
        return answers

    def all_reduce(self, rank: int, world: int, place: tuple[str, int], backend: str, seconds: float) -> tuple[float, float]:
        """Sum a vector of ones over `world` processes that meet at `place`: returns one number of the sum, and the seconds it took.

        backend: gloo on CPUs, or nccl on the first GPU of this process. Raises RuntimeError of torch where they do not find each other.
        """
        import torch
        import torch.distributed as dist

        use_node_address()
        device = "cuda" if backend == "nccl" else "cpu"
        meeting, limit = f"tcp://{place[0]}:{place[1]}", timedelta(seconds=seconds)
        dist.init_process_group(backend, init_method=meeting, rank=rank, world_size=world, timeout=limit)
        try:
            vector = torch.ones(NUMBERS, device=device)
            begin = time.monotonic()
            dist.all_reduce(vector)
            total = float(vector[-1])  # waits for the GPU
            return total, time.monotonic() - begin
        finally:
            dist.destroy_process_group()


def _take_all(server: socket.socket) -> None:
    with suppress(OSError):  # until the process ends
        while True:
            server.accept()[0].close()
