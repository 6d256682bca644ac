"""The SFT stage: a causal language model fine-tuned on the assistant turns of conversations."""

from __future__ import annotations

from typing import Any

from app.config.recipe import Recipe
from app.data.token_cache import HELD_OUT_FILE, TRAIN_FILE, encode_threads, write_threads
from app.models.context import require_context
from app.run_folder import RunFolder
from app.stages.preparation import Prepared
from app.stages.supervised import require_rows, speed, train
from app.tasks.sft import SftTask
from app.tracking import RunTracker


def train_sft(recipe: Recipe, run: RunFolder, tracker: RunTracker, prepared: Prepared) -> dict[str, Any]:
    """Fine-tune `prepared.model_path` and leave `DIR/sft/model`; returns the stage's results, for the caller to commit.

    An unfinished stage goes on from its last checkpoint. Results: eval_loss_before,
    eval_loss_after (nats per target token on held-out threads), steps, tokens, tokens_per_second, train_seconds.
    Raises DataError without threads on either side of the split, and what `app.workers.training.fit` raises.
    """
    require_context(prepared.context, recipe.data.max_length, "data.max_length")
    data, corpus = run.stage("sft") / "data", prepared.corpus
    rows, held_out = (encode_threads(side.threads, prepared.template, recipe.data.max_length) for side in (corpus.train, corpus.validation))
    require_rows("SFT", "threads", rows, held_out)
    write_threads(rows, data / TRAIN_FILE)
    write_threads(held_out, data / HELD_OUT_FILE)
    model = recipe.model
    task = SftTask(data, prepared.model_path, model.precision, model.trust_remote_code, recipe.sft, recipe.run.seed)
    result = train(task, recipe.sft, recipe, rows=len(rows), folder=run.stage("sft"), tracker=tracker)
    return {"eval_loss_before": result.before["loss"], "eval_loss_after": result.after["loss"], **speed(result)}
