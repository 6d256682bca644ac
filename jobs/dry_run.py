"""What `--dry-run` prints under the resolved recipe, as TOML comments: sizes, placement, and what stands in the way."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from app.config.recipe import Recipe
from app.errors import CorralError
from app.planning.placement import check_feasible, describe
from jobs.command import refused_path


def sizes(recipe: Recipe, command: str) -> str:
    """Batches, steps and processes of each stage of a command, and what a cluster must have for it."""
    plan = describe(recipe, command)
    lines = [f"# corral {command}: derived sizes"]
    for stage, facts in plan["stages"].items():
        numbers = ", ".join(f"{name} {value}" for name, value in facts.items() if name != "roles")
        lines.append(f"# stage {stage}{': ' + numbers if numbers else ''}")
        lines += [f"#   {role:<26} {_processes(take)}" for role, take in facts["roles"].items()]
    needs = plan["needs"]
    lines.append(f"# needs {needs['CPU']:g} CPUs, {needs['GPU']:g} GPUs, {needs['memory_gib']:g} GiB of host memory (estimate)")
    return "\n".join(lines) + "\n"


def obstacles(recipe: Recipe, command: str, check: Callable[[], object]) -> str:
    """What the command would be refused for as things are, one thing a line: room on this machine, data that is not there, a run folder
    that holds another run. Empty where nothing is seen. Writes nothing, and asks no cluster and no hub.

    check: the command's own check of what it is given."""
    from app.trackers.opening import require_packages
    from jobs import local_ray

    checks: list[Callable[[], object]] = [check]
    if not local_ray.uses_cluster():
        checks.insert(0, lambda: check_feasible(recipe, command, local_ray.cluster_resources(), local_ray.cluster_nodes()))
    if command != "serve":
        checks += [lambda: require_packages(recipe.tracking), lambda: _check_run_folder(recipe)]
    lines = [f"# would be refused here and now: {' '.join(reason.split())}\n" for reason in map(_refusal, checks) if reason]
    return "".join([*lines, *_room_elsewhere(command)])


def _refusal(check: Callable[[], object]) -> str:
    try:
        check()
    except CorralError as error:
        return str(error)
    except OSError as error:
        reason = refused_path(error)
        if reason is None:
            raise
        return reason
    return ""


def _check_run_folder(recipe: Recipe) -> None:
    from app.run_folder import refuse_other_run, refuse_place, run_identity

    folder = Path(recipe.run.dir).absolute()
    refuse_place(folder, resume=recipe.run.resume)
    refuse_other_run(folder, run_identity(recipe))


def _room_elsewhere(command: str) -> Iterator[str]:
    """That nobody has looked for room, where a cluster would have to be asked."""
    from jobs import local_ray

    if local_ray.uses_cluster():
        yield (
            f"# whether the cluster at RAY_ADDRESS = {os.environ['RAY_ADDRESS']} has room is not looked at here: "
            f"`corral doctor RECIPE --for {command}` asks it\n"
        )


def _processes(take: dict[str, Any]) -> str:
    gpus = f"the GPU of a {take['shares']}" if take["shares"] else f"{take['gpus']:g} GPU"
    return f"{take['count']} x {take['cpus']:g} CPU, {gpus}, {take['threads']} threads"
