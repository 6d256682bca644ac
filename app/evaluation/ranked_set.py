"""A reward model on a ranked set: the metrics of its training stage over all groups of any data source."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from app.config.recipe import Recipe
from app.data.baselines import pair_accuracy
from app.data.corpus import Corpus
from app.data.encoding import Cuts, encode_groups
from app.data.templates import build_template
from app.data.token_cache import GroupRow
from app.errors import DataError, ScoringError
from app.evaluation.local_scorer import compute_device
from app.evaluation.progress import Advance, progress
from app.models.heads import load_reward_model, reward_offset
from app.models.load import load_tokenizer
from app.tasks.reward_model import RewardModelTask, SequenceScores

LENGTH_RULE = "the longer reply wins"
"""The baseline has no training split to learn its orientation from."""


def evaluate_ranked_set(path: str, corpus: Corpus, recipe: Recipe) -> dict[str, Any]:
    """Metrics of the reward model in `path` on every group of both sides of `corpus`, beside the length baseline.

    recipe: data.template, data.max_length, model.precision, rm.score_l2 (part of the loss), scoring.max_batch_tokens.
    Raises DataError without groups, ScoringError when the model computes NaN.
    """
    groups = (*corpus.train.groups, *corpus.validation.groups)
    if not groups:
        raise DataError(
            f"{corpus.path} ({corpus.format} format): no prompt with two or more ranked replies; check data.format and data.lang"
        )
    config = recipe.model
    template = build_template(recipe.data.template, load_tokenizer(path, config.trust_remote_code))
    cuts = Cuts()
    rows = list(encode_groups(groups, template, recipe.data, recipe.run.seed, cuts))
    reward_model = load_reward_model(path, precision=config.precision, trust_remote_code=config.trust_remote_code)
    model = SequenceScores(reward_model, sharing=False).to(compute_device())
    task = RewardModelTask(Path(), path, recipe.run.seed, config.trust_remote_code, recipe.rm)
    with progress("ranked groups", len(rows)) as advance:
        metrics = group_metrics(model, task, rows, max_tokens=recipe.scoring.max_batch_tokens, advance=advance)
    if not math.isfinite(metrics["loss"]):
        raise ScoringError(f"{path}: computed NaN or infinity; check the model folder, or use --model.precision=fp32")
    return {
        "model": path,
        "dataset": str(corpus.path),
        "format": corpus.format,
        "groups": len(groups),
        "replies": sum(len(group.replies) for group in groups),
        "pairs": sum(group.pairs for group in groups),
        "max_length": recipe.data.max_length,
        **cuts.as_dict(),
        "reward_offset": reward_offset(reward_model),
        **metrics,
        "length_baseline": pair_accuracy([[float(len(reply)) for reply in group.replies] for group in groups]),
        "length_baseline_rule": LENGTH_RULE,
    }


@torch.inference_mode()
def group_metrics(
    model: nn.Module, task: RewardModelTask, rows: Sequence[GroupRow], *, max_tokens: int, advance: Advance
) -> dict[str, float]:
    """The task's metrics from its sums over all rows: exact, however the rows are batched."""
    device = next(model.parameters()).device
    sums: dict[str, float] = defaultdict(float)
    for batch in group_batches(rows, max_tokens):
        for name, value in task.evaluate(model, [rows[i] for i in batch], device).items():
            sums[name] += value
        advance(len(batch))
    return task.summarise(sums)


def group_batches(rows: Sequence[GroupRow], max_tokens: int) -> list[list[int]]:
    """Groups of similar length together, so that replies x longest reply <= max_tokens; a larger group is a batch of its own."""
    longest = [max(map(len, row.sequences)) for row in rows]
    batches: list[list[int]] = []
    replies = 0
    for index in sorted(range(len(rows)), key=lambda i: -longest[i]):
        size = len(rows[index].sequences)
        if batches and longest[batches[-1][0]] * (replies + size) <= max_tokens:
            batches[-1].append(index)
            replies += size
        else:
            batches.append([index])
            replies = size
    return batches
