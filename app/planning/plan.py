"""A plan: whether a command fits a cluster, what would help where it does not, and what it takes in time and money."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from app.config.recipe import Recipe
from app.errors import PlacementError
from app.planning.devices import Device, gpus_in_use, hosts_in_use
from app.planning.hardware import Cluster
from app.planning.memory import total
from app.planning.packing import NodeResources, Slot
from app.planning.placement import StagePlacement, concurrent_trials, placement
from app.planning.shapes import shape_of
from app.planning.shortages import fullest, shortage, small_engines
from app.planning.timing import Timing, Workload, stage_timing
from app.planning.trained import unknown_targets


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
    assumed: tuple[str, ...] = ()
    """What the plan takes for granted, in words."""

    @property
    def fits(self) -> bool:
        return all(stage.fits for stage in self.stages)

    @property
    def price(self) -> float | None:
        """USD per hour of the nodes that some stage uses."""
        return self.cluster.price({slot.node for stage in self.stages for slot in stage.slots})

    @property
    def seconds(self) -> float | None:
        """Of all stages that have steps, with every trial of a search to its last one; None where one's number of steps is open, or its
        processes find no place."""
        if not all(stage.slots for stage in self.stages):
            return None
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
            "assumed": list(self.assumed),
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
        planned = tuple(_plan_stage(sized, stage, nodes, workload or Workload()) for stage in stages)
        plan = Plan(command, nodes, planned, _assumed(recipe, {stage.name for stage in stages}))
        if plan.fits:
            break
    return plan


def _assumed(recipe: Recipe, stages: Collection[str]) -> tuple[str, ...]:
    shape = shape_of(recipe.model.path)
    sections = (("sft", recipe.sft, "sft"), ("rm", recipe.rm, "rm"), ("ppo", recipe.ppo, "ppo"), ("ppo", recipe.ppo, "tune"))
    unknown = {key: unknown_targets(shape, config.lora) for key, config, stage in sections if shape and config.lora and stage in stages}
    return tuple(
        f"{key}.lora.targets: no linear layer called {', '.join(names)} is known of this kind of model; where it has none of that name "
        "training refuses it, so look the names up"
        for key, names in unknown.items()
        if names
    )


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
    devices = (*gpus_in_use(stage, slots, cluster), *hosts_in_use(stage, slots, cluster))
    shortages = (*small_engines(recipe, stage, cluster), *(shortage(recipe, stage, device) for device in fullest(devices)))
    nodes_of = {role.name: len({slot.node for slot in slots if slot.role == role.name}) for role in stage.roles}
    return StagePlan(stage, slots, devices, shortages, stage_timing(recipe, stage, cluster, workload, nodes_of))


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
