"""`corral doctor`: whether this machine, or every node of a cluster, can run Corral."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from app.errors import ConfigError, CorralError
from jobs.command import Tool
from jobs.diagnosis.check import Check
from jobs.planning import COMMANDS

if TYPE_CHECKING:
    from app.config.recipe import Recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe", nargs="?", metavar="RECIPE", help="also check whether `corral COMMAND RECIPE` fits the machine or cluster"
    )
    parser.add_argument(
        "--for",
        dest="purpose",
        default="pipeline",
        metavar="COMMAND",
        help=f"the command to check RECIPE for: one of {', '.join(COMMANDS)} (default: pipeline)",
    )
    parser.add_argument("--address", help="of a Ray cluster, such as 10.0.0.1:6379, whose nodes are checked (default: RAY_ADDRESS)")
    parser.add_argument("--seconds", type=float, default=30.0, metavar="N", help="deadline of every question to a node (default: 30)")
    parser.add_argument("--json", action="store_true", help="print one JSON object: `ok`, and `checks` with name, node, finding and remedy")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Print every check; 1 when one failed. Raises ConfigError for a command that there is none of."""
    if arguments.purpose not in COMMANDS:
        raise ConfigError(f"--for {arguments.purpose}: name one of {', '.join(COMMANDS)}")
    if arguments.address:
        os.environ["RAY_ADDRESS"] = arguments.address
    done = []
    for check in checks(arguments.recipe, arguments.purpose, overrides, arguments.seconds):
        done.append(check)
        if not arguments.json:
            sys.stdout.write(f"{check}\n")
            sys.stdout.flush()
    ok = not any(check.failed for check in done)
    if arguments.json:
        sys.stdout.write(json.dumps({"ok": ok, "checks": [asdict(check) for check in done]}, indent=2) + "\n")
    return 0 if ok else 1


def checks(path: str | None, command: str, overrides: list[str], seconds: float) -> Iterator[Check]:
    """This machine, then Ray, then the nodes of the cluster where there is one, then the recipe."""
    from jobs import local_ray
    from jobs.diagnosis import machine

    recipe, unreadable = _read(path, overrides)
    locks, disks = machine.pinned(), machine.disks_of(recipe.run.dir if recipe else None)
    yield from machine.machine_checks(locks, disks)
    ray = machine.ray_answers()
    yield ray
    if local_ray.uses_cluster() and not ray.failed:
        from jobs.diagnosis.cluster import cluster_checks

        yield from cluster_checks(locks, disks, recipe.run.dir if recipe else None, seconds)
    if unreadable is not None:
        yield unreadable
    elif recipe is not None and not ray.failed:
        yield feasibility(recipe, str(path), command)


def _read(path: str | None, overrides: list[str]) -> tuple[Recipe | None, Check | None]:
    """The recipe, or why it cannot be read."""
    from app.config.loading import load_recipe

    if path is None:
        return None, None
    try:
        return load_recipe(path, overrides), None
    except CorralError as error:
        return None, Check("recipe", str(error), "see there")


def feasibility(recipe: Recipe, path: str, command: str) -> Check:
    """Whether the recipe's placement fits; where it does not, what is short."""
    from app.planning.placement import check_feasible
    from jobs import local_ray

    try:
        check_feasible(recipe, command, local_ray.cluster_resources(), local_ray.cluster_nodes())
    except CorralError as error:
        return Check("recipe", str(error), "see there")
    return Check("recipe", f"corral {command} {path} fits")


TOOL = Tool(
    purpose="check this machine or the nodes of a cluster and, with a recipe, whether it fits there",
    details=(
        "Prints one line per check; the exit code is 0 when none failed. Of a cluster every node is asked for its packages, addresses,\n"
        "clock, shared memory, disks, thread limit and GPUs, connects to all others, and takes part in a small all-reduce; one that does\n"
        "not answer in time is named.\n\nexamples:\n  corral doctor jobs/recipes/tiny/pipeline.toml\n"
        "  corral doctor jobs/recipes/pythia/ppo-12b.toml --for ppo --address 10.0.0.1:6379"
    ),
    add_arguments=add_arguments,
    run=run,
)
