"""What every GPU, and the host memory of every node, would hold at its fullest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from app.planning.hardware import Cluster
from app.planning.memory import GIB, Parts, add, total
from app.planning.packing import Slot
from app.planning.placement import StagePlacement
from app.planning.roles import Role, Turn

CONTEXT = int(0.8 * GIB)  # what CUDA, its libraries and NCCL take of a GPU for each process; vLLM's share of one comes on top of its own
RAY_BYTES = int(1.25 * GIB)  # of Ray's own processes and the driver on the first node that is used: docs/results/demo.md
USABLE = 0.97  # of a GPU's memory: the allocator cannot use what lies between its blocks


@dataclass(frozen=True)
class Device:
    """One GPU, or the host memory of one node. parts: bytes by role and what holds them, at its fullest; they add up to `used`."""

    name: str
    capacity: int
    parts: dict[str, Parts]

    @property
    def used(self) -> int:
        return sum(total(parts) for parts in self.parts.values())

    @property
    def fits(self) -> bool:
        return self.used <= self.capacity


def gpus_in_use(stage: StagePlacement, slots: Sequence[Slot], cluster: Cluster) -> list[Device]:
    """Every GPU in use, at the turn that fills it most."""
    roles = {role.name: role for role in stage.roles}
    on_gpu: dict[tuple[int, int], list[Role]] = {}
    for slot in slots:
        for gpu in slot.gpus:
            on_gpu.setdefault((slot.node, gpu), []).append(roles[slot.role])
    devices = []
    for (node, gpu), there in sorted(on_gpu.items()):
        kind = cluster.nodes[node].gpu
        assert kind is not None
        devices.append(Device(f"node {node} GPU {gpu}", int(USABLE * kind.memory), _at_its_fullest(there, stage.overlapping)))
    return devices


def _at_its_fullest(roles: Sequence[Role], overlapping: bool) -> dict[str, Parts]:
    """Roles of one GPU take turns: those whose turn it is hold what they work with, the others what they rest with.

    Not quite: reward model and reference judge what has been sampled while the rest still is, and learners judge when they do."""

    def held(role: Role, turn: Turn | None) -> Parts:
        if turn is None or role.turn == turn or (role.turn, turn) == ("scoring", "rollout"):
            return role.working
        return role.judging if turn == "scoring" else role.resting

    def moment(turn: Turn | None) -> dict[str, Parts]:
        parts: dict[str, Parts] = {}
        for role in roles:
            parts[role.name] = add(parts.get(role.name, {}), held(role, turn), {"context": CONTEXT})
        return parts

    turns: Iterable[Turn | None] = [None] if overlapping else dict.fromkeys(role.turn for role in roles)
    return max((moment(turn) for turn in turns), key=lambda parts: sum(map(total, parts.values())))


def hosts_in_use(stage: StagePlacement, slots: Sequence[Slot], cluster: Cluster) -> list[Device]:
    """The host memory of every node in use."""
    roles = {role.name: role for role in stage.roles}
    devices: list[Device] = []
    for node in sorted({slot.node for slot in slots}):
        parts: dict[str, Parts] = {}
        there = [slot for slot in slots if slot.node == node]
        for slot in there:
            role = roles[slot.role]
            parts[role.name] = add(parts.get(role.name, {}), role.host, {} if role.gpus else role.working)
        memory = cluster.nodes[node].memory
        if not devices:
            parts["ray"] = {"process": RAY_BYTES}
        if stored := stage.object_store(there, memory):
            parts["object store"] = {"weights": stored}
        devices.append(Device(f"node {node} host memory", memory, parts))
    return devices
