"""The reward-model stage: Bradley-Terry training over ranked groups, and the offset that centres its scores."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import ray

from app.config.recipe import Recipe
from app.config.shared import WorkersConfig
from app.data.baselines import length_baseline
from app.data.corpus import Corpus
from app.data.encoding import Cuts, encode_groups
from app.data.mixture import Mixture
from app.data.reshaping import with_worst_reply
from app.data.token_cache import HELD_OUT_FILE, TRAIN_FILE, read_groups, write_groups
from app.durable import read_json, write_json
from app.errors import CorralError
from app.experience import IntArray
from app.formats.records import RankedGroup
from app.models.context import require_context
from app.run_folder import RunFolder
from app.run_layout import DATA
from app.stages.preparation import Prepared
from app.stages.supervised import require_rows, speed, train
from app.tasks.reward_model import RewardModelTask, mean_raw_score
from app.tracking import RunTracker
from app.workers.pending import collect
from app.workers.processes import process_options


def train_reward_model(recipe: Recipe, run: RunFolder, tracker: RunTracker, prepared: Prepared, *, sft_path: str) -> dict[str, Any]:
    """Train on the trunk of `sft_path` and leave `DIR/rm/model`, its reward_offset still 0; returns the results, for the caller to commit.

    An unfinished stage goes on from its last checkpoint. Results, on held-out groups: loss, loss_before, the metrics of
    `app.numerics.ranking_metrics` with raw scores, and what reply length alone would get, oriented on the training groups:
    length_baseline (pair accuracy), length_best_vs_worst, length_kendall_tau, length_spearman; where there are several data sets, the
    same of each set under `NAME/`; then steps, tokens, tokens_per_second, train_seconds; of both sides, truncated (groups that lost
    tokens) and left_out (groups whose replies the cut made the same).
    Raises DataError without groups on either side of the split, and what `app.workers.training.fit` raises.
    """
    require_context(prepared.context, recipe.data.max_length, "data.max_length")
    data, corpus = run.stage("rm") / DATA, prepared.corpus
    limit, seed, cuts = recipe.rm.max_replies, recipe.run.seed, Cuts()
    trained = (with_worst_reply(group, seed) for group in _best_replies(corpus.train.groups, limit))
    rows, held_out = (
        write_groups(encode_groups(groups, prepared.template, recipe.data, seed, cuts), data / file)
        for groups, file in ((trained, TRAIN_FILE), (_best_replies(corpus.validation.groups, limit), HELD_OUT_FILE))
    )
    require_rows("reward model", "ranked groups", rows, held_out)
    mixture = Mixture.of(read_groups(data / TRAIN_FILE).datasets, corpus.settings)
    task = RewardModelTask(data, sft_path, seed, recipe.model.trust_remote_code, recipe.rm, multiple=recipe.data.pad_to_multiple)
    result = train(task, recipe.rm, recipe, mixture=mixture, folder=run.stage("rm"), tracker=tracker)
    baselines = _length_baselines(corpus, limit)
    return {**result.after, "loss_before": result.before["loss"], **baselines} | speed(result) | cuts.as_dict()


def _length_baselines(corpus: Corpus, limit: int) -> dict[str, float]:
    """What reply length alone would get on held-out groups and, where there are several data sets, on those of each."""
    found: dict[str, float] = {}
    sets = sorted({group.dataset for group in corpus.validation.groups})
    for prefix, dataset in [("", None), *((f"{name}/", name) for name in sets if len(sets) > 1)]:
        train_groups, held_out = (_best_replies(_of_set(side.groups, dataset), limit) for side in (corpus.train, corpus.validation))
        baseline = length_baseline(train_groups, held_out)
        found[f"{prefix}length_baseline"] = baseline.pop("pair_accuracy")
        found |= {f"{prefix}length_{name}": value for name, value in baseline.items()}
    return found


def _of_set(groups: Iterable[RankedGroup], dataset: str | None) -> Iterator[RankedGroup]:
    """The groups of one data set, or all of them; as they come, since a corpus may be larger than memory."""
    return (group for group in groups if dataset in (None, group.dataset))


def set_reward_offset(
    model_folder: Path,
    sequences: Sequence[IntArray],
    workers: WorkersConfig,
    *,
    deadline_seconds: float,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    trust_remote_code: bool = False,
) -> float:
    """Make the mean score of `sequences` (prompt + answer, int32 [S] each) 0: store their mean raw score as `reward_offset` in
    the folder's config.json, in one step, and return it.

    Scores are computed in a Ray task with the resources of one of `workers`. Raises CorralError or DeadlineError.
    """
    task = ray.remote(mean_raw_score).options(**process_options(workers))
    reference = task.remote(str(model_folder.absolute()), list(sequences), workers.threads, precision, trust_remote_code)
    offset: float = collect([reference], phase="reward offset", deadline_seconds=deadline_seconds, failure=CorralError)[0]
    file = model_folder / "config.json"
    write_json(file, read_json(file) | {"reward_offset": offset})
    return offset


def training_replies(run: RunFolder, limit: int) -> list[IntArray]:
    """Prompt + reply, int32 [S] each, of the first `limit` groups that the reward model was trained on."""
    return [sequence for group in read_groups(run.stage("rm") / DATA / TRAIN_FILE)[:limit] for sequence in group.sequences]


def _best_replies(groups: Iterable[RankedGroup], limit: int) -> Iterator[RankedGroup]:
    """Each group's `limit` best replies."""
    return (replace(group, replies=group.replies[:limit], gold=None if group.gold is None else group.gold[:limit]) for group in groups)
