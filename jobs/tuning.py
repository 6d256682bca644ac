"""`corral tune`: hyperparameter search over PPO."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Column, Table

from jobs.command import Command
from jobs.session import session

if TYPE_CHECKING:
    from app.config.recipe import Recipe


FILE_WIDTH = 200
"""Characters that a line of the table may take where it goes to no terminal."""


def run(recipe: Recipe) -> None:
    """PPO trials under ASHA that share one scoring service."""
    with session(recipe, "tune") as frame:
        from app.planning.placement import concurrent_trials
        from app.stages.tune import run_tune
        from jobs.local_ray import cluster_nodes, cluster_resources
        from jobs.scoring_service import scoring_service

        concurrent = concurrent_trials(recipe, cluster_resources(), cluster_nodes())
        results = run_tune(recipe, frame.run, frame.corpus, frame.tracker, scoring_service(recipe), concurrent)["tune"]
    show(results, recipe.ppo.steps)


def show(results: Mapping[str, Any], steps: int) -> None:
    """The trials as a table, best first, and the best configuration as options to copy."""
    console = Console()
    if not console.is_terminal:
        console.width = FILE_WIDTH
    names = list(results["best_config"])
    table = Table(*(Column(name, overflow="fold") for name in ("trial", "objective", "score", "KL", "steps", *names)))
    for row in sorted(results["trials"], key=lambda row: -math.inf if row["objective"] is None else row["objective"], reverse=True):
        numbers = ["failed" if row[name] is None else f"{row[name]:.3f}" for name in ("objective", "score", "kl")]
        ended = f"{row['steps']}/{steps}" + ("" if row["status"] == "finished" else f" {row['status']}")
        table.add_row(row["trial"], *numbers, ended, *(_short(row["config"][name]) for name in names))
    console.print(table)
    console.print(
        "best: " + " ".join(f"--{name}={value}" for name, value in results["best_config"].items()), soft_wrap=True, highlight=False
    )


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


COMMAND = Command(
    purpose="search PPO hyperparameters with ASHA",
    details=(
        "Reads what `corral ppo` reads and the search space in tune.space. Every trial is one PPO run; all trials share one scoring\n"
        "service. Prints a table of the trials and the best configuration, and writes both to run.dir/summary.json."
    ),
    example="corral tune jobs/recipes/tiny/tune.toml --tune.trials=8",
    sections=("run", "tracking", "data", "model", "reward", "tune", "ppo", "rollout", "scoring", "alarms", "evaluation"),
    run=run,
)
