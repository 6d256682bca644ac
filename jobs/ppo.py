"""`corral ppo`: PPO against a reward model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.command import Command
from jobs.session import session

if TYPE_CHECKING:
    from app.config.recipe import Recipe


def run(recipe: Recipe) -> None:
    """PPO and its evaluation, from an SFT model and a reward model."""
    with session(recipe, "ppo") as frame:
        from app.stages.pipeline import run_ppo
        from jobs.scoring_service import scoring_service

        run_ppo(recipe, frame.run, frame.corpus, frame.tracker, scoring_service(recipe))


COMMAND = Command(
    purpose="improve an SFT model by PPO against a reward model",
    details=(
        "Reads prompts (data.path), an SFT model (model.path) and a reward model (reward.path); the embedded model goes through\n"
        "SFT and reward-model training first. Leaves run.dir/ppo/model, summary.json and report.html."
    ),
    example="corral ppo jobs/recipes/tiny/ppo.toml --ppo.kl.coef=0.1",
    sections=("run", "tracking", "data", "model", "reward", "ppo", "rollout", "scoring", "alarms", "evaluation"),
    run=run,
)
