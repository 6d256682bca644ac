"""What `--dry-run` prints under the resolved recipe, as TOML comments: sizes, placement, and what stands in the way."""

from __future__ import annotations

from typing import Any

from app.config.recipe import Recipe
from app.errors import CorralError
from app.planning.placement import describe


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


def obstacle(recipe: Recipe, command: str) -> str:
    """What the command would be refused for as things are, such as data that is not there; empty where nothing is seen."""
    from jobs.inputs import check_inputs

    try:
        check_inputs(recipe, command)
    except CorralError as error:
        return f"# would be refused here and now: {error}\n"
    return ""


def _processes(take: dict[str, Any]) -> str:
    gpus = f"the GPU of a {take['shares']}" if take["shares"] else f"{take['gpus']:g} GPU"
    return f"{take['count']} x {take['cpus']:g} CPU, {gpus}, {take['threads']} threads"
