"""`corral plan`: whether a recipe fits a cluster, and what it would take in time and money, before anything is started."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from app.errors import ConfigError
from jobs.command import Tool

if TYPE_CHECKING:
    from app.config.recipe import Recipe
    from app.planning.devices import Device
    from app.planning.hardware import Accelerator, Cluster
    from app.planning.plan import Plan, StagePlan

COMMANDS = ("pipeline", "sft", "rm", "ppo", "tune", "serve", "evaluate")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="TOML file; any of its keys may follow as --dotted.key=value")
    parser.add_argument(
        "--cluster",
        default="local",
        metavar="SPEC",
        help="NODES x GPUS x KIND such as 1x8xA100-80GB, a Ray cluster file, or `local`: this machine (default)",
    )
    parser.add_argument(
        "--for", dest="purpose", metavar="COMMAND", help=f"one of {', '.join(COMMANDS)} (default: what the recipe's name begins with)"
    )
    parser.add_argument(
        "--rows", type=int, metavar="N", help="SFT and reward model: threads or ranked groups in the data, for the number of steps"
    )
    parser.add_argument(
        "--mean-length", type=int, metavar="TOKENS", help="of a usual sequence, or answer in PPO (default: the longest allowed)"
    )
    parser.add_argument("--price", type=float, metavar="USD", help="per hour of each node, instead of the list's")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Print the plan; 1 where the recipe does not fit. Raises ConfigError for a recipe or cluster that cannot be read, a model of unknown
    size and numbers that nothing has."""
    from app.config.loading import load_recipe
    from app.planning.plan import make_plan
    from app.planning.timing import Workload

    command = arguments.purpose or command_of(arguments.recipe)
    if command not in COMMANDS:
        raise ConfigError(f"--for {command}: name one of {', '.join(COMMANDS)}")
    for option, least in (("rows", 1), ("mean_length", 1), ("price", 0)):
        value = getattr(arguments, option)
        if value is not None and not least <= value < math.inf:
            raise ConfigError(f"--{option.replace('_', '-')} {value:g}: give {least} or more, and a finite number")
    recipe = load_recipe(arguments.recipe, overrides)
    require_known_sizes(recipe, command)
    cluster = find_cluster(arguments.cluster)
    if arguments.price is not None:
        cluster = replace(cluster, nodes=tuple(replace(node, price=arguments.price, read=None) for node in cluster.nodes))
    plan = make_plan(recipe, command, cluster, Workload(arguments.mean_length, arguments.rows))
    text = json.dumps(plan.as_dict(), indent=2) if arguments.json else "\n".join(lines(plan))
    sys.stdout.write(f"{text}\n")
    return 0 if plan.fits else 1


def require_known_sizes(recipe: Recipe, command: str) -> None:
    """Raises ConfigError for a model whose size nothing tells: its weights would count as nothing, and everything would fit."""
    from app.planning.shapes import shape_of

    paths = [("model.path", recipe.model.path), ("reward.path", recipe.reward.path)]
    paths += [("reward.parts", path) for path in recipe.reward.model_paths()]
    if command == "serve":
        paths = [(f"serving.models.{name}.path", model.path) for name, model in recipe.serving.models.items()]
        paths += [(f"serving.chat.{name}.path", model.path) for name, model in recipe.serving.chat.items()]
    for key, path in paths:
        if path is not None and shape_of(path) is None:
            raise ConfigError(
                f"{key} = {path}: its size is unknown: give a folder with a config.json (mixtures of experts are not counted), or a name "
                "with its size such as mine-7b"
            )


def command_of(recipe: str) -> str:
    """`pythia/rm-1.4b.toml` is for `corral rm`.

    >>> command_of("jobs/recipes/pythia/rm-1.4b.toml"), command_of("mine.toml")
    ('rm', 'pipeline')
    """
    first = Path(recipe).name.removesuffix(".toml").split("-")[0]
    return first if first in COMMANDS else "pipeline"


def find_cluster(spec: str) -> Cluster:
    """Raises ConfigError."""
    from app.planning.cluster_file import cluster_from_file
    from app.planning.hardware import cluster_from_spec

    if spec == "local":
        return this_machine()
    if spec.endswith((".yaml", ".yml")):
        return cluster_from_file(Path(spec).expanduser())
    return cluster_from_spec(spec)


def this_machine() -> Cluster:
    """Its cores, memory and GPUs. Raises ConfigError for a GPU that the table does not know."""
    import psutil

    from app.planning.hardware import Cluster, Machine
    from jobs import local_ray

    gpus = local_ray.local_gpus()
    gpu = _local_gpu() if gpus else None
    return Cluster("local", (Machine("this machine", local_ray.local_cpus(), psutil.virtual_memory().total, gpus, gpu),))


def _local_gpu() -> Accelerator:
    import torch

    from app.planning.hardware import GPUS

    found = torch.cuda.get_device_properties(0)
    named = [gpu for gpu in GPUS.values() if gpu.name.split("-")[0] in found.name.replace(" ", "")]
    if not named:
        raise ConfigError(f"--cluster local: {found.name} is not among {', '.join(GPUS)}: name one like it, such as 1x1x{next(iter(GPUS))}")
    nearest = min(named, key=lambda gpu: abs(gpu.memory - found.total_memory))
    return replace(nearest, memory=found.total_memory)


def lines(plan: Plan) -> Iterator[str]:
    """The plan for people."""
    from app.planning.memory import GIB

    yield f"corral {plan.command} on {plan.cluster.name}: {'fits' if plan.fits else 'DOES NOT FIT'}"
    for stage in plan.stages:
        yield f"stage {stage.stage.name}: {_time(plan, stage)}"
        for device, alike in _grouped(stage.devices):
            held = "; ".join(f"{name} {_parts(parts)}" for name, parts in device.parts.items())
            also = f" (and {alike} like it)" if alike else ""
            yield f"  {device.name}{also}: {device.used / GIB:.1f} of {device.capacity / GIB:.1f} GiB: {held}"
        for shortage in stage.shortages:
            yield f"  short: {shortage}"
    for text in plan.assumed:
        yield f"assumed: {text}"
    if plan.seconds is not None:
        search = any(stage.timing and stage.timing.trials > 1 for stage in plan.stages)
        bound = ", with every trial to its last step; schedulers stop some before" if search else ""
        yield f"in all: {'at most ' if search else ''}{_duration(plan.seconds)}{_money(plan, plan.seconds)}{bound}"
    elif any(stage.timing for stage in plan.stages) and all(stage.slots for stage in plan.stages):
        yield "in all: open; give --rows, the number of rows in the data"
    if plan.price is not None:
        day = plan.cluster.prices_read
        yield f"{plan.price:.2f} USD an hour{f', list prices of {day.isoformat()}' if day else ''}; times are good to about a factor of two"


def _time(plan: Plan, stage: StagePlan) -> str:
    timing = stage.timing
    if timing is None:
        return "no place for its processes" if not stage.slots else "takes no steps"
    phases = ", ".join(f"{name} {seconds:.3g}" for name, seconds in timing.phases.items() if seconds >= 0.01 * timing.seconds_per_step)
    phases += "; they overlap" if timing.overlapped is not None else ""
    steps = "" if timing.steps is None else f", {timing.steps} steps"
    trials = f" a trial, {timing.trials} trials, {timing.concurrent} at a time" if timing.trials > 1 else ""
    return f"{timing.seconds_per_step:.3g} s a step{_money(plan, timing.seconds_per_step)} ({phases}){steps}{trials}"


def _grouped(devices: tuple[Device, ...]) -> list[tuple[Device, int]]:
    """Devices that hold the same once, and how many more there are."""
    groups: list[list[Device]] = []
    for device in devices:
        same = next((group for group in groups if (group[0].parts, group[0].capacity) == (device.parts, device.capacity)), None)
        if same is None:
            groups.append([device])
        else:
            same.append(device)
    return [(group[0], len(group) - 1) for group in groups]


def _parts(parts: dict[str, int]) -> str:
    from app.planning.memory import GIB

    shown = [f"{name} {size / GIB:.1f}" for name, size in parts.items() if size >= 0.05 * GIB]
    return ", ".join(shown) or "under 0.1"


def _money(plan: Plan, seconds: float) -> str:
    cost = plan.cost(seconds)
    return "" if cost is None else f", {cost:.2f} USD"


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


TOOL = Tool(
    purpose="memory, time and cost of a recipe on a cluster, before anything is started",
    details=(
        "Memory of every GPU and node by role and by what holds it, whether it fits and what to change if not; seconds and cost of a\n"
        "step and of the run. Needs no network and no GPU: sizes are read from the config.json of a local model, or known from its name\n"
        "(Pythia, SmolLM2, Llama, Mistral, or any size in a name). A search counts as all its trials to their last step, so many at a\n"
        "time as tune.concurrent says. The exit code is 1 where it does not fit.\n\n"
        "example:\n  corral plan jobs/recipes/pythia/ppo-12b.toml --cluster 1x8xA100-80GB"
    ),
    add_arguments=add_arguments,
    run=run,
)
