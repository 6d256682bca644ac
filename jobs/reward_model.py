"""`corral rm`: reward model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.command import Command
from jobs.session import session

if TYPE_CHECKING:
    from app.config.recipe import Recipe


def run(recipe: Recipe) -> None:
    """Reward-model training alone."""
    with session(recipe, "rm") as frame:
        from app.stages.pipeline import run_rm

        run_rm(recipe, frame.run, frame.corpus, frame.tracker)


COMMAND = Command(
    purpose="train a reward model on ranked answers",
    details=(
        "Reads ranked answers (data.path) and an SFT model (model.path; the embedded model goes through SFT first). model.path may\n"
        "also be an encoder such as DeBERTa, or a reward model, which is trained further.\n"
        "Leaves run.dir/rm/model, a sequence-classification folder whose config holds reward_offset."
    ),
    example="corral rm jobs/recipes/tiny/rm.toml --model.path=runs/demo/sft/model",
    sections=("run", "tracking", "data", "model", "rm", "rollout"),
    run=run,
)
