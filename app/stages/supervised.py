"""What the SFT and the reward-model stage share: one Ray Train run with the recipe's settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from app.config.recipe import Recipe
from app.config.training import TrainingConfig
from app.data.mixture import Mixture
from app.errors import DataError
from app.stages.interruption import stop_requests
from app.tracking import RunTracker
from app.workers.supervised_task import SupervisedTask, TrainingResult
from app.workers.training import fit, training_steps


def train(
    task: SupervisedTask, config: TrainingConfig, recipe: Recipe, *, mixture: Mixture, folder: Path, tracker: RunTracker
) -> TrainingResult:
    """Train on the rows that `mixture` describes; SIGINT and SIGTERM end it with a checkpoint and Interrupted. Raises what `fit` raises."""
    steps = training_steps(config, mixture.rows_per_epoch)
    doubt = config.optimizer.doubt(f"{task.stage}.optimizer", steps)
    if doubt:
        tracker.note(doubt)
    tracker.begin(task.stage, steps)
    with stop_requests() as stop_requested:
        result = fit(
            task,
            config,
            steps=steps,
            mixture=mixture,
            precision=recipe.model.precision,
            seed=recipe.run.seed,
            folder=folder,
            tracker=tracker,
            deadline_seconds=recipe.run.deadline_seconds,
            stop_requested=stop_requested,
        )
    tracker.end(task.stage)
    return result


def require_rows(stage: str, kind: str, train_rows: int, held_out: int) -> None:
    """Raises DataError unless there is something to train on and something to evaluate on."""
    if not train_rows or not held_out:
        raise DataError(
            f"{stage} has {train_rows} {kind} to train on and {held_out} held out, and needs both: "
            "give more conversation trees (data.path), or change data.val_split"
        )


def speed(result: TrainingResult) -> dict[str, Any]:
    """The part of a stage's results that is the same for both; train_seconds are those of optimizer steps alone."""
    return {
        "steps": result.steps,
        "tokens": result.tokens,
        "tokens_per_second": result.tokens_per_second,
        "train_seconds": result.seconds,
    }
