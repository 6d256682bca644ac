"""The SFT stage: a causal language model fine-tuned on the assistant turns of conversations."""

from __future__ import annotations

from typing import Any

from app.config.recipe import Recipe
from app.data.encoding import Cuts, encode_threads
from app.data.mixture import Mixture
from app.data.reshaping import chained
from app.data.token_cache import HELD_OUT_FILE, TRAIN_FILE, read_threads, write_threads
from app.models.context import require_context
from app.run_folder import RunFolder
from app.run_layout import DATA
from app.stages.preparation import Prepared
from app.stages.supervised import require_rows, speed, train
from app.tasks.sft import SftTask
from app.tracking import RunTracker


def train_sft(recipe: Recipe, run: RunFolder, tracker: RunTracker, prepared: Prepared) -> dict[str, Any]:
    """Fine-tune `prepared.model_path` and leave `DIR/sft/model`; returns the stage's results, for the caller to commit.

    An unfinished stage goes on from its last checkpoint. Results, on held-out threads: eval_loss_before and eval_loss_after (nats per
    target token), eval_accuracy_before and _after (share of target tokens that the model finds likeliest), the same of each data set
    where there are several; steps, tokens, tokens_per_second, train_seconds; of both sides, truncated (threads that lost tokens) and
    left_out (threads without a target in what was kept).
    Raises DataError without threads on either side of the split, and what `app.workers.training.fit` raises.
    """
    require_context(prepared.context, recipe.data.max_length, "data.max_length")
    data, corpus = run.stage("sft") / DATA, prepared.corpus
    seed, cuts = recipe.run.seed, Cuts()
    rows, held_out = (
        write_threads(encode_threads(chained(threads, corpus.settings, seed), prepared.template, recipe.data, seed, cuts), data / file)
        for threads, file in ((corpus.train.threads, TRAIN_FILE), (corpus.validation.threads, HELD_OUT_FILE))
    )
    require_rows("SFT", "threads", rows, held_out)
    mixture = Mixture.of(read_threads(data / TRAIN_FILE).datasets, corpus.settings)
    model, multiple = recipe.model, recipe.data.pad_to_multiple
    task = SftTask(data, prepared.model_path, model.precision, model.trust_remote_code, recipe.sft, seed, multiple=multiple)
    result = train(task, recipe.sft, recipe, mixture=mixture, folder=run.stage("sft"), tracker=tracker)
    quality = {
        f"eval_{name}_{when}": found[name] for name in result.after for when, found in (("before", result.before), ("after", result.after))
    }
    return quality | speed(result) | cuts.as_dict()
