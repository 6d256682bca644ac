"""`corral tune`: hyperparameter search over PPO."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from jobs.command import Command
from jobs.session import session

if TYPE_CHECKING:
    from app.config.recipe import Recipe
    from app.search.results import Search, Trial


FILE_WIDTH = 200
"""Characters that a line of the table may take where it goes to no terminal."""


def run(recipe: Recipe) -> None:
    """PPO trials that share one scoring service; what they found as a table, as `tune/trials.parquet` and as `tune.html`."""
    with session(recipe, "tune") as frame:
        from app.planning.placement import concurrent_trials
        from app.search.page import write_page
        from app.search.results import Search, write_trials
        from app.stages.tune import run_tune
        from jobs.local_ray import cluster_nodes, cluster_resources
        from jobs.scoring_service import scoring_service

        concurrent = concurrent_trials(recipe, cluster_resources(), cluster_nodes())
        run_tune(recipe, frame.run, frame.corpus, frame.tracker, scoring_service(recipe), concurrent)
        search = Search.read(frame.run.path)
        files = [write_trials(search), write_page(search)]
    sys.stdout.write("".join(f"{file}\n" for file in files))
    console = Console()
    if not console.is_terminal:
        console.width = FILE_WIDTH
    show(search, recipe.ppo.steps, console)


def show(search: Search, steps: int, console: Console) -> None:
    """The trials as a table, highest objective first, and the best configuration as options to copy."""
    from app.search.results import as_options

    table = Table(
        *(Column(name, no_wrap=True) for name in ("trial", "end")),
        *(Column(name, justify="right") for name in ("objective", "score", "KL", "steps")),
        *(Column(key, overflow="fold", justify="right") for key in search.keys),
    )
    for trial in search.trials:
        numbers = ["" if value is None else f"{value:.3f}" for value in (trial.objective, trial.score, trial.kl)]
        values = [_short(trial.config.get(key)) for key in search.keys]
        best = trial.name == search.best
        table.add_row(trial.name, _end(trial, best), *numbers, f"{trial.steps}/{steps}", *values, style="bold" if best else None)
    console.print(table)
    for trial in search.trials:
        if reason := trial.error or trial.why:
            console.print(f"{trial.name}: {reason}", soft_wrap=True, highlight=False, markup=False)
    if search.winner is not None:
        options = " ".join(as_options(search.winner.config))
        console.print(f"best: {options}", soft_wrap=True, highlight=False, markup=False)
        console.print(f"as a recipe: corral tune --promote {search.path}", soft_wrap=True, highlight=False, markup=False)


def _end(trial: Trial, best: bool) -> Text:
    from app.search.records import BROKEN, UNTRIED

    colour = "green" if best else "red" if trial.status in (*BROKEN, *UNTRIED) else ""
    return Text(f"best, {trial.status}" if best else trial.status, style=colour)


def _short(value: object) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


COMMAND = Command(
    purpose="search PPO hyperparameters",
    details=(
        "Reads what `corral ppo` reads and the search space in tune.space. Every trial is one PPO run; all trials share one scoring\n"
        "service. Prints a table of the trials and the best configuration, and leaves in run.dir: summary.json, tune/trials.parquet,\n"
        "and tune.html with parallel coordinates, the importance of each key, curves, and score against KL.\n"
        "`corral tune --promote DIR` then writes the best configuration as a recipe."
    ),
    example="corral tune jobs/recipes/tiny/tune.toml --tune.trials=8",
    sections=("run", "tracking", "data", "model", "reward", "tune", "ppo", "rollout", "scoring", "alarms", "evaluation"),
    run=run,
)
