"""`corral evaluate`: SFT model against PPO model on held-out prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.command import Command
from jobs.session import session

if TYPE_CHECKING:
    from app.config.recipe import Recipe


def run(recipe: Recipe) -> None:
    """The comparison that ends a pipeline, alone."""
    with session(recipe, "evaluate") as frame:
        from app.stages.pipeline import run_evaluation
        from jobs.scoring_service import scoring_service

        run_evaluation(recipe, frame.run, frame.corpus, frame.tracker, scoring_service(recipe))


COMMAND = Command(
    purpose="compare run.dir/ppo/model with the SFT model on held-out prompts",
    details=(
        "Reads prompts (data.path), the SFT model (run.dir/sft/model or model.path), the reward model (reward.path or\n"
        "run.dir/rm/model) and run.dir/ppo/model.\n"
        "Same prompts and sampling seeds for both; leaves means and win rate with 95 % intervals in run.dir/summary.json.\n\n"
        "Tools beside it, each with its own --help: corral evaluate rm | samples | score | best-of-n | trees"
    ),
    example="corral evaluate jobs/recipes/tiny/pipeline.toml --run.dir=runs/demo",
    sections=("run", "tracking", "data", "model", "reward", "rollout", "scoring", "evaluation"),
    run=run,
)
