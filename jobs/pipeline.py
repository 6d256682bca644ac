"""`corral pipeline`: the main job."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.command import Command
from jobs.session import session

if TYPE_CHECKING:
    from app.config.recipe import Recipe


def run(recipe: Recipe) -> None:
    """SFT, reward model, PPO and their evaluation."""
    with session(recipe, "pipeline") as frame:
        from app.stages.pipeline import run_pipeline
        from jobs.scoring_service import scoring_service

        run_pipeline(recipe, frame.run, frame.corpus, frame.tracker, scoring_service(recipe))


COMMAND = Command(
    purpose="train an assistant: SFT, then a reward model, then PPO against it",
    details=(
        "Reads conversations (data.path) and a base model (model.path). Leaves in run.dir: sft/model, rm/model and ppo/model\n"
        "(folders that transformers loads), summary.json, metrics.jsonl, TensorBoard events, report.html and manifest.json.\n"
        "The same command goes on where an interrupted one stopped."
    ),
    example="corral pipeline jobs/recipes/tiny/pipeline.toml --run.dir=runs/demo",
    sections=("run", "tracking", "data", "model", "sft", "rm", "reward", "ppo", "rollout", "scoring", "alarms", "evaluation"),
    run=run,
)
