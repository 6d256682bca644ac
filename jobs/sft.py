"""`corral sft`: supervised fine-tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.command import Command
from jobs.session import session

if TYPE_CHECKING:
    from app.config.recipe import Recipe


def run(recipe: Recipe) -> None:
    """Supervised fine-tuning alone."""
    with session(recipe, "sft") as frame:
        from app.stages.pipeline import run_sft

        run_sft(recipe, frame.run, frame.corpus, frame.tracker)


COMMAND = Command(
    purpose="fine-tune a base model on the assistant turns of conversations",
    details="Reads conversations (data.path) and a base model (model.path). Leaves run.dir/sft/model.",
    example="corral sft jobs/recipes/tiny/sft.toml --sft.epochs=2",
    sections=("run", "tracking", "data", "model", "sft"),
    run=run,
)
