"""Which node and which GPUs each process gets: strict rules, computed from logical resources alone.

- `pack`: the processes talk to each other all the time (ranks of one training), so they take as few nodes as they can.
- `spread`: they work alone and load a node's memory and network (rollout engines, replicas), so the emptiest node is next.
- A process with one or more GPUs owns them whole, all on one node. Fractions share a GPU with fractions alone: in the order of the
  requests, each on the GPU in use that it fills most, as Ray does when the processes start.
- A role that shares another's GPUs sits on them, process by process, and takes none of its own: a pair is placed as one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Literal

from app.errors import PlacementError

Strategy = Literal["pack", "spread"]
Resource = Literal["labels", "GPU", "CPU", "memory"]
ORDER: tuple[Resource, ...] = ("labels", "GPU", "CPU", "memory")
ROUNDING = 1e-6
UNIT = 10_000  # parts of a GPU that Ray counts in
SEARCHED = 16  # fractions whose packing is searched for
SHOWN_NODES = 8


@dataclass(frozen=True)
class NodeResources:
    """What one node offers. memory: bytes."""

    cpus: float
    gpus: int = 0
    memory: float = math.inf
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """The processes of one role, and what each of them takes. shares: the role whose GPUs it sits on; labels: of its nodes."""

    role: str
    count: int
    cpus: float
    gpus: float = 0.0
    memory: float = 0.0
    strategy: Strategy = "spread"
    shares: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def own_gpus(self) -> float:
        return 0.0 if self.shares else self.gpus


@dataclass(frozen=True)
class Slot:
    """Where process `index` of a role runs: its node, and the indices of its GPUs there."""

    role: str
    index: int
    node: int
    gpus: tuple[int, ...]


@dataclass
class FreeNode:
    """What is left of a node. gpus: the free share of each; begun: those that fractions have started to use."""

    index: int
    cpus: float
    memory: float
    gpus: list[float]
    labels: Mapping[str, str]
    begun: set[int] = field(default_factory=set)

    @property
    def whole(self) -> list[int]:
        """GPUs that nobody has touched."""
        return [gpu for gpu, share in enumerate(self.gpus) if share == 1.0]

    def gpus_for(self, gpus: float) -> tuple[int, ...] | None:
        """GPUs for one process, for a fraction the begun one with the least room; None where there are too few."""
        if gpus >= 1:
            need = math.ceil(gpus)
            return tuple(self.whole[:need]) if len(self.whole) >= need else None
        if not gpus:
            return ()
        fitting = [gpu for gpu in sorted(self.begun) if self.gpus[gpu] + ROUNDING >= gpus]
        return (min(fitting, key=lambda gpu: round(self.gpus[gpu], 6)),) if fitting else tuple(self.whole[:1]) or None

    def lacks(self, request: Request) -> Resource | None:
        """The first resource that this node has too little of for one process."""
        if not request.labels.items() <= self.labels.items():
            return "labels"
        if self.gpus_for(request.own_gpus) is None:
            return "GPU"
        if self.cpus + ROUNDING < request.cpus:
            return "CPU"
        return "memory" if self.memory < request.memory else None

    def joins(self, request: Request) -> bool:
        """Whether a process would share a GPU that is in use already."""
        return bool(self.begun & set(self.gpus_for(request.own_gpus) or ()))

    def take(self, request: Request) -> tuple[int, ...]:
        """Give one process what it asks for; returns its GPUs."""
        chosen = self.gpus_for(request.own_gpus) or ()
        self.cpus -= request.cpus
        self.memory -= request.memory
        for gpu in chosen:
            self.gpus[gpu] -= min(1.0, request.gpus)
            if request.gpus < 1:
                self.begun.add(gpu)
        return chosen

    def left(self, resource: Resource) -> str:
        """In words."""
        shown = {
            "labels": _written(self.labels) or "no label",
            "GPU": f"{len(self.whole)} whole GPUs",
            "CPU": f"{self.cpus:.3g} CPUs",
            "memory": f"{self.memory / 2**30:.3g} GiB",
        }
        return shown[resource]


def gpus_needed(fractions: Iterable[float]) -> int:
    """The fewest GPUs that hold these parts of one, none of which spans two; for more than SEARCHED parts a bound from below.

    >>> gpus_needed([0.4, 0.4, 0.1, 0.1]), gpus_needed([0.6, 0.6, 0.5]), gpus_needed([])
    (1, 3, 0)
    """
    parts = sorted((max(1, round(fraction * UNIT)) for fraction in fractions), reverse=True)
    # a GPU holds so many at most of those that are no smaller than this one
    least = max([math.ceil(sum(parts) / UNIT), *(math.ceil((i + 1) / (UNIT // part)) for i, part in enumerate(parts))])
    if len(parts) > SEARCHED:
        return least

    @cache
    def fit(placed: int, room: tuple[int, ...]) -> bool:
        if placed == len(parts):
            return True
        left = ((gpu, free - parts[placed]) for gpu, free in enumerate(room) if free >= parts[placed])
        return any(fit(placed + 1, tuple(sorted((*room[:gpu], free, *room[gpu + 1 :])))) for gpu, free in left)

    return next(count for count in range(least, len(parts) + 1) if fit(0, (UNIT,) * count))


def assign(requests: Sequence[Request], nodes: Sequence[NodeResources], stage: str = "") -> tuple[Slot, ...]:
    """A slot for every process, in the order of `requests`.

    Packed roles come first, so that they find whole nodes; where that leaves no node whole enough for a process with many GPUs or
    CPUs, those come first. Raises PlacementError that names the role, what one of its processes lacks and what every node still has.
    """
    try:
        return _assign(requests, sorted(requests, key=_packed_first), nodes, stage)
    except PlacementError as error:
        try:
            return _assign(requests, sorted(requests, key=_largest_first), nodes, stage)
        except PlacementError:
            raise error from None


def _packed_first(request: Request) -> tuple[bool, bool, bool, float]:
    """Owners before those that share with them; whole GPUs before fractions, which stay in their order; those that not every node will
    do for; then by what has to lie together."""
    if 0 < request.gpus < 1:
        return request.shares is not None, True, True, 0.0
    gang = request.gpus * (request.count if request.strategy == "pack" else 1)
    return request.shares is not None, False, not request.labels, -gang


def _largest_first(request: Request) -> tuple[bool, bool, bool, float, float]:
    if 0 < request.gpus < 1:
        return request.shares is not None, True, True, 0.0, 0.0
    return request.shares is not None, False, not request.labels, -request.gpus, -request.cpus


def _with_sharers(request: Request, index: int, requests: Sequence[Request]) -> Request:
    """What process `index` and those that sit on its GPUs take together."""
    there = [request, *(other for other in requests if other.shares == request.role and index < other.count)]
    return replace(request, cpus=sum(each.cpus for each in there), memory=sum(each.memory for each in there))


def _assign(requests: Sequence[Request], order: Sequence[Request], nodes: Sequence[NodeResources], stage: str) -> tuple[Slot, ...]:
    free = [FreeNode(index, node.cpus, node.memory, [1.0] * node.gpus, node.labels) for index, node in enumerate(nodes)]
    slots: dict[str, list[Slot]] = {}
    for request in order:
        placed: list[Slot] = []
        slots[request.role] = placed
        for index in range(request.count):
            if request.shares:
                owner = slots[request.shares][index]
                placed.append(Slot(request.role, index, owner.node, owner.gpus))
                continue
            together = _with_sharers(request, index, requests)
            able = [node for node in free if node.lacks(together) is None]
            if not able:
                raise PlacementError(_shortage(together, index, free, stage))
            node = _choose(together, able, [slot.node for slot in placed])
            placed.append(Slot(request.role, index, node.index, node.take(together)))
    return tuple(slot for request in requests for slot in slots[request.role])


def _choose(request: Request, able: Sequence[FreeNode], used: Sequence[int]) -> FreeNode:
    """A fraction joins others; then by strategy; then the emptiest node."""

    def rank(node: FreeNode) -> tuple[float, ...]:
        by_strategy = used.count(node.index) if request.strategy == "spread" else node.index not in used
        return not node.joins(request), by_strategy, -len(node.whole), -node.cpus, node.index

    return min(able, key=rank)


def _shortage(request: Request, index: int, nodes: Sequence[FreeNode], stage: str) -> str:
    """The resource that the nearest node lacks, and what is left of it everywhere."""
    lacking: list[Resource] = [node.lacks(request) or "GPU" for node in nodes]
    scarce = max(lacking, key=ORDER.index, default=ORDER[2])
    needs = {
        "labels": f"a node with {_written(request.labels)}",
        "GPU": f"{request.gpus:g} GPU{'s' if request.gpus > 1 else ''} on one node",
        "CPU": f"{request.cpus:g} CPUs on one node",
        "memory": f"{request.memory / 2**30:.3g} GiB of memory on one node",
    }
    left = "; ".join(f"node {node.index}: {node.left(scarce)}" for node in nodes[:SHOWN_NODES])
    more = f"; and {len(nodes) - SHOWN_NODES} nodes more" if len(nodes) > SHOWN_NODES else ""
    where = f"stage {stage}: " if stage else ""
    return f"{where}{request.role} {index + 1} of {request.count} needs {needs[scarce]}, and there is left: {left or 'no node'}{more}"


def _written(labels: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in labels.items())
