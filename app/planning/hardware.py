"""GPUs, machines and what they cost.

FLOP rates are dense ones from the makers' data sheets, memory is what CUDA reports as usable. Prices are lists' for one hour on demand,
in USD, with the day they were read; `--price` replaces them, and a machine without one has no cost.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import date

from app.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True)
class Accelerator:
    """memory: bytes; half, single: FLOP/s in 16 bits and in float32; bandwidth, link: of its memory and to its neighbours, bytes/s."""

    name: str
    memory: int
    half: float
    single: float
    bandwidth: float
    link: float

    def rate(self, width: int) -> float:
        """FLOP/s with numbers of `width` bytes."""
        return self.half if width == 2 else self.single


def _gpu(name: str, gib: float, half: float, single: float, bandwidth: float, link: float) -> Accelerator:
    return Accelerator(name, int(gib * GIB), half * 1e12, single * 1e12, bandwidth * 1e12, link * 1e9)


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("A100-40GB", 39.4, 312, 19.5, 1.555, 300),
        _gpu("A100-80GB", 79.1, 312, 19.5, 2.039, 300),
        _gpu("H100-80GB", 79.1, 989, 67, 3.35, 450),
        _gpu("H200-141GB", 139.8, 989, 67, 4.8, 450),
        _gpu("L40S-48GB", 44.4, 362, 91.6, 0.864, 25),
        _gpu("A10G-24GB", 22.0, 70, 31.2, 0.6, 25),
        _gpu("L4-24GB", 22.0, 121, 30.3, 0.3, 25),
        _gpu("RTX4090-24GB", 23.6, 165, 82.6, 1.008, 25),
    )
}
CPU_CORE = Accelerator("CPU core", 0, 40e9, 80e9, 8e9, 2e9)
"""One core of a server CPU with AVX2 or AVX-512; 16 bits are emulated there."""


@dataclass(frozen=True)
class Machine:
    """A kind of node. memory: bytes; network: to other nodes, bytes/s; price: USD per hour, None where unknown; read: its day."""

    name: str
    cpus: int
    memory: int
    gpus: int = 0
    gpu: Accelerator | None = None
    network: float = 12.5e9
    price: float | None = None
    read: date | None = None
    labels: Mapping[str, str] = field(default_factory=dict)


def _machine(
    name: str, cpus: int, gib: int, gpus: tuple[int, str] | None, gbits: float, price: float | None = None, read: date | None = None
) -> Machine:
    count, kind = (gpus[0], GPUS[gpus[1]]) if gpus else (0, None)
    return Machine(name, cpus, gib * GIB, count, kind, gbits * 1e9 / 8, price, read)


_SUMMER, _WINTER = date(2026, 8, 26), date(2025, 12, 21)

MACHINES = {
    machine.name: machine
    for machine in (
        _machine("m6i.4xlarge", 16, 64, None, 12.5, 0.768, _WINTER),  # four times m6i.xlarge, as this family is priced
        _machine("p4d.24xlarge", 96, 1152, (8, "A100-40GB"), 400, 21.95764, _SUMMER),
        _machine("p4de.24xlarge", 96, 1152, (8, "A100-80GB"), 400, 27.44705, _WINTER),
        _machine("p5.48xlarge", 192, 2048, (8, "H100-80GB"), 3200, 55.04, _WINTER),
        _machine("p5en.48xlarge", 192, 2048, (8, "H200-141GB"), 3200, 63.296, _SUMMER),
        _machine("n2-standard-16", 16, 64, None, 32),
        _machine("a2-highgpu-8g", 96, 680, (8, "A100-40GB"), 100),
        _machine("a2-ultragpu-8g", 96, 1360, (8, "A100-80GB"), 100),
        _machine("a3-highgpu-8g", 208, 1872, (8, "H100-80GB"), 1000),
    )
}
"""Machines that cluster files name. Prices: AWS, Oregon (us-west-2)."""

_SPEC = re.compile(r"(\d+)x(\d+)x([\w-]+)")
_PER_GPU_CPUS, _PER_GPU_GIB = 12, 144  # as p4d and p4de have


@dataclass(frozen=True)
class Cluster:
    """The machines that a command would run on, one entry for each node. elastic: only the head and nodes in use are paid for."""

    name: str
    nodes: tuple[Machine, ...]
    elastic: bool = False

    @property
    def gpu(self) -> Accelerator | None:
        """The kind with the least memory, which has to hold the largest process."""
        return min((node.gpu for node in self.nodes if node.gpu is not None), key=lambda gpu: gpu.memory, default=None)

    def price(self, used: Collection[int]) -> float | None:
        """USD per hour while the nodes in `used` work; None when one's price is unknown."""
        paid = [node for index, node in enumerate(self.nodes) if not self.elastic or index == 0 or index in used]
        prices = [node.price for node in paid if node.price is not None]
        return sum(prices) if len(prices) == len(paid) else None

    @property
    def prices_read(self) -> date | None:
        """The oldest day of a price in it."""
        return min((node.read for node in self.nodes if node.read is not None), default=None)


MOST_NODES, MOST_GPUS = 10_000, 1000
"""More would be a slip of the finger, and keep a plan busy for hours."""


def cluster_from_spec(spec: str) -> Cluster:
    """Nodes x GPUs of each x kind, such as `4x8xH100-80GB`. Raises ConfigError.

    Cores, memory and price are those of a listed machine with that GPU, by the number of GPUs.
    """
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise ConfigError(f"--cluster {spec}: write NODES x GPUS x KIND such as 1x8xA100-80GB, `local`, or the path of a cluster file")
    nodes, gpus, kind = int(match[1]), int(match[2]), match[3]
    if kind not in GPUS:
        raise ConfigError(f"--cluster {spec}: unknown GPU {kind}: known are {', '.join(GPUS)}")
    if not nodes or not gpus:
        raise ConfigError(f"--cluster {spec}: a cluster has at least one node with one GPU; `local` plans for this machine")
    if nodes > MOST_NODES or gpus > MOST_GPUS:
        raise ConfigError(f"--cluster {spec}: plans are for at most {MOST_NODES} nodes with {MOST_GPUS} GPUs each: give fewer")
    return Cluster(spec, (_node(gpus, kind),) * nodes)


def _node(gpus: int, kind: str) -> Machine:
    listed = next((machine for machine in MACHINES.values() if machine.gpu is GPUS[kind] and machine.price is not None), None)
    if listed is None:
        return Machine(f"{gpus}x{kind}", _PER_GPU_CPUS * gpus, _PER_GPU_GIB * GIB * gpus, gpus, GPUS[kind])
    share = gpus / listed.gpus
    price = None if listed.price is None else listed.price * share
    name = listed.name if share == 1 else f"{gpus}/{listed.gpus} {listed.name}"
    cpus, memory = int(listed.cpus * share), int(listed.memory * share)
    return Machine(name, cpus, memory, gpus, GPUS[kind], listed.network * share, price, listed.read)
