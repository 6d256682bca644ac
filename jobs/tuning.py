"""`corral tune`: hyperparameter search over PPO."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.command import Command
from jobs.session import session

if TYPE_CHECKING:
    from app.config.recipe import Recipe


def run(recipe: Recipe) -> None:
    """PPO trials under ASHA that share one scoring service."""
    with session(recipe, "tune") as frame:
        from app.stages.tune import run_tune
        from jobs.scoring_service import scoring_service

        run_tune(recipe, frame.run, frame.corpus, frame.tracker, scoring_service(recipe))


COMMAND = Command(
    purpose="search PPO hyperparameters with ASHA",
    details=(
        "Reads what `corral ppo` reads and the search space in tune.space. Every trial is one PPO run; all trials share one scoring\n"
        "service. Prints a table of the trials and the best configuration, and writes both to run.dir/summary.json."
    ),
    example="corral tune jobs/recipes/tiny/tune.toml --tune.trials=8",
    sections=("run", "data", "model", "reward", "tune", "ppo", "rollout", "scoring", "evaluation"),
    run=run,
)
