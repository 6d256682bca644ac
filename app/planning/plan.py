"""A plan: whether a command fits a cluster, what would help where it does not, and what it takes in time and money."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from app.config.recipe import Recipe
from app.errors import PlacementError
from app.planning.hardware import Cluster
from app.planning.memory import GIB, Parts, add, total
from app.planning.packing import NodeResources, Slot
from app.planning.placement import StagePlacement, concurrent_trials, placement
from app.planning.roles import Role
from app.planning.timing import Timing, Workload, stage_timing

CONTEXT = int(0.8 * GIB)  # what CUDA, its libraries and NCCL take of a GPU for each process; vLLM's share of one comes on top of its own
RAY_BYTES = int(1.25 * GIB)  # of Ray's own processes and the driver on the first node that is used: docs/results/demo.md
USABLE = 0.97  # of a GPU's memory: the allocator cannot use what lies between its blocks

REMEDIES = {
    "activations": "set {key}.gradient_checkpointing = true or lower {stage}.micro_batch_size",
    "logits": "lower {stage}.micro_batch_size",
    "optimizer": "add workers, or set {key}.offload_optimizer = true",
    "gradients": "set {key}.zero_stage = 2 or add workers",
    "weights": "set {key}.zero_stage = 3, or take GPUs with more memory or a smaller model",
    "buffers": "lower zero_optimization.reduce_bucket_size in {key}.extra",
    "kv_cache": "lower rollout.gpu_memory_utilization",
}


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


@dataclass(frozen=True)
class StagePlan:
    """One stage on the cluster. slots and devices are empty where its processes find no place."""

    stage: StagePlacement
    slots: tuple[Slot, ...]
    devices: tuple[Device, ...]
    shortages: tuple[str, ...]
    timing: Timing | None

    @property
    def fits(self) -> bool:
        return not self.shortages


@dataclass(frozen=True)
class Plan:
    """All stages of one command."""

    command: str
    cluster: Cluster
    stages: tuple[StagePlan, ...]

    @property
    def fits(self) -> bool:
        return all(stage.fits for stage in self.stages)

    @property
    def price(self) -> float | None:
        """USD per hour of the nodes that some stage uses."""
        return self.cluster.price({slot.node for stage in self.stages for slot in stage.slots})

    @property
    def seconds(self) -> float | None:
        """Of all stages that have steps, with every trial of a search to its last one; None where one's number of steps is open."""
        timings = [stage.timing for stage in self.stages if stage.timing is not None]
        seconds = [timing.seconds for timing in timings if timing.seconds is not None]
        return sum(seconds) if timings and len(seconds) == len(timings) else None

    def cost(self, seconds: float | None) -> float | None:
        """USD for so many seconds."""
        return None if seconds is None or self.price is None else seconds / 3600 * self.price

    def as_dict(self) -> dict[str, Any]:
        """For `--json`. `bytes`: of one process of each role on its device at its peak; `seconds_per_step` is the last stage's."""
        timed = [stage.timing for stage in self.stages if stage.timing is not None]
        per_step = timed[-1].seconds_per_step if timed else None
        day = self.cluster.prices_read
        return {
            "command": self.command,
            "cluster": self.cluster.name,
            "fits": self.fits,
            "shortages": [text for stage in self.stages for text in stage.shortages],
            "bytes": {role.name: total(role.working) for stage in self.stages for role in stage.stage.roles},
            "seconds_per_step": per_step,
            "cost_per_step": self.cost(per_step),
            "seconds": self.seconds,
            "cost": self.cost(self.seconds),
            "price_per_hour": self.price,
            "prices_read": None if day is None or self.price is None else day.isoformat(),
            "stages": [_stage_dict(stage) for stage in self.stages],
        }


def make_plan(recipe: Recipe, command: str, cluster: Cluster, workload: Workload | None = None) -> Plan:
    """Plan `command` on `cluster`: on the fewest nodes of one that grows with its work. A stage that does not fit is part of the
    plan, with the reasons."""
    gpu = cluster.gpu
    sizes = range(1, len(cluster.nodes) + 1) if cluster.elastic else [len(cluster.nodes)]
    for size in sizes:
        nodes = replace(cluster, nodes=cluster.nodes[:size])
        sized = _with_trials(recipe, nodes) if command == "tune" else recipe
        stages = placement(sized, command, None if gpu is None else gpu.memory)
        plan = Plan(command, nodes, tuple(_plan_stage(sized, stage, nodes, workload or Workload()) for stage in stages))
        if plan.fits:
            break
    return plan


def _with_trials(recipe: Recipe, cluster: Cluster) -> Recipe:
    """The recipe with as many trials at a time as a search would run on this cluster."""
    nodes = _resources(cluster)
    have = {"CPU": sum(node.cpus for node in nodes), "GPU": sum(node.gpus for node in nodes)}
    memory = sum(node.memory for node in cluster.nodes)
    concurrent = concurrent_trials(recipe, {**have, "memory": memory}, nodes)
    return recipe.model_copy(update={"tune": recipe.tune.model_copy(update={"concurrent": concurrent})})


def _resources(cluster: Cluster) -> tuple[NodeResources, ...]:
    return tuple(NodeResources(node.cpus, node.gpus, labels=node.labels) for node in cluster.nodes)


def _plan_stage(recipe: Recipe, stage: StagePlacement, cluster: Cluster, workload: Workload) -> StagePlan:
    try:
        slots = stage.slots(_resources(cluster))
    except PlacementError as error:
        return StagePlan(stage, (), (), (f"{error}: lower its count or take a larger cluster",), None)
    devices = (*_gpus(stage, slots, cluster), *_hosts(stage, slots, cluster))
    shortages = (*_small_engines(recipe, stage, cluster), *(_shortage(stage, device) for device in _fullest(devices)))
    nodes_of = {role.name: len({slot.node for slot in slots if slot.role == role.name}) for role in stage.roles}
    return StagePlan(stage, slots, devices, shortages, stage_timing(recipe, stage, cluster, workload, nodes_of))


def _gpus(stage: StagePlacement, slots: Sequence[Slot], cluster: Cluster) -> list[Device]:
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
    """Roles of one GPU take turns: those whose turn it is hold what they work with, the others what they rest with."""

    def moment(turn: str | None) -> dict[str, Parts]:
        parts: dict[str, Parts] = {}
        for role in roles:
            held = role.working if turn is None or role.turn == turn else role.resting
            parts[role.name] = add(parts.get(role.name, {}), held, {"context": CONTEXT})
        return parts

    turns: Iterable[str | None] = [None] if overlapping else {role.turn for role in roles}
    return max((moment(turn) for turn in turns), key=lambda parts: sum(map(total, parts.values())))


def _hosts(stage: StagePlacement, slots: Sequence[Slot], cluster: Cluster) -> list[Device]:
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


def _fullest(devices: Sequence[Device]) -> list[Device]:
    """Of the GPUs, and of the hosts, that do not fit, the fullest; the others are like it."""
    full = [device for device in devices if not device.fits]
    kinds = {"GPU" in device.name: device for device in sorted(full, key=lambda device: device.used)}
    return list(kinds.values())


def _small_engines(recipe: Recipe, stage: StagePlacement, cluster: Cluster) -> list[str]:
    """vLLM refuses to start where its share of a GPU holds no weights, workspace and one sequence."""
    gpu = cluster.gpu
    engine = next((role for role in stage.roles if role.name == "engine"), None)
    if gpu is None or engine is None or not engine.gpus or total(engine.working) <= recipe.rollout.gpu_memory_utilization * gpu.memory:
        return []
    share, given = recipe.rollout.gpu_memory_utilization, recipe.rollout.gpu_memory_utilization * gpu.memory / GIB
    return [
        f"stage {stage.name}: engine needs {total(engine.working) / GIB:.1f} GiB of a GPU ({_shown(engine.working)}), and "
        f"rollout.gpu_memory_utilization = {share:g} of {gpu.name} gives it {given:.1f} GiB: "
        "raise it, or rollout.engines.gpus, or take GPUs with more memory"
    ]


def _shortage(stage: StagePlacement, device: Device) -> str:
    roles = {role.name: role for role in stage.roles}
    largest = max(device.parts, key=lambda name: total(device.parts[name]))
    part = max(device.parts[largest], key=lambda name: device.parts[largest][name])
    held = "; ".join(f"{name} {_shown(parts)}" for name, parts in device.parts.items())
    remedy = "take nodes with more memory, or fewer processes on each"
    if "GPU" in device.name and largest in roles:
        section = roles[largest].key.split(".", maxsplit=1)[0]
        remedy = REMEDIES.get(part, REMEDIES["weights"]).format(key=f"{section}.deepspeed", stage=section)
    return f"stage {stage.name}: {device.name} would hold {device.used / GIB:.1f} of {device.capacity / GIB:.1f} GiB ({held}): {remedy}"


def _shown(parts: Parts) -> str:
    return ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items() if size >= 0.05 * GIB) or "little"


def _stage_dict(plan: StagePlan) -> dict[str, Any]:
    timing = plan.timing
    return {
        "name": plan.stage.name,
        "fits": plan.fits,
        "roles": [
            {
                "name": role.name,
                "count": role.count,
                "bytes": total(role.working),
                "parts": role.working,
                "host_bytes": total(role.host),
                "host_parts": role.host,
                "slots": [{"node": slot.node, "gpus": list(slot.gpus)} for slot in plan.slots if slot.role == role.name],
            }
            for role in plan.stage.roles
        ],
        "devices": [
            {"name": device.name, "bytes": device.used, "capacity": device.capacity, "parts": device.parts} for device in plan.devices
        ],
        "steps": None if timing is None else timing.steps,
        "trials": None if timing is None else timing.trials,
        "concurrent": None if timing is None else timing.concurrent,
        "seconds_per_step": None if timing is None else timing.seconds_per_step,
        "phases": None if timing is None else dict(timing.phases),
    }
