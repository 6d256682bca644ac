"""The reward-model stage: Bradley-Terry training over ranked groups, and the offset that centres its scores.

Shape legend: N replies of all groups of a micro-batch, S tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import ray
import torch
from torch import nn
from transformers import PreTrainedModel

from app.config.recipe import Recipe
from app.config.shared import WorkersConfig
from app.data.baselines import length_baseline
from app.data.collate import collate_groups
from app.data.token_cache import GroupRow, encode_groups, read_groups, write_groups
from app.durable import read_json, write_json
from app.errors import CorralError
from app.experience import IntArray
from app.formats.records import RankedGroup
from app.models.context import require_context
from app.models.forward import pad_sequences, padded_batches
from app.models.heads import init_reward_model, load_reward_model, save_reward_model, sequence_scores
from app.models.load import load_tokenizer
from app.numerics.preference import best_worst_hits, group_bradley_terry_loss, pair_hits
from app.run_folder import RunFolder
from app.stages.preparation import Prepared
from app.stages.supervised import HELD_OUT_FILE, TRAIN_FILE, require_rows, speed, train
from app.tracking import RunTracker
from app.workers.pending import collect
from app.workers.processes import process_options

SCORING_TOKENS = 8192
"""Tokens (with padding) of one forward pass when the offset is measured."""


class SequenceScores(nn.Module):
    """A reward model whose forward is the raw score of each reply."""

    def __init__(self, reward_model: PreTrainedModel) -> None:
        super().__init__()
        self.reward_model = reward_model

    def forward(self, ids_NS: torch.Tensor, attention_NS: torch.Tensor) -> torch.Tensor:
        """Raw logits float32 [N]."""
        return sequence_scores(self.reward_model, ids_NS, attention_NS)


@dataclass(frozen=True)
class RewardModelTask:
    """`SupervisedTask` over the parquet files in `data`. The loss is the mean over all groups of an optimizer step."""

    data: Path
    sft_path: str
    seed: int
    score_l2: float
    trust_remote_code: bool
    stage: str = "rm"

    def build_model(self) -> nn.Module:
        return SequenceScores(init_reward_model(self.sft_path, seed=self.seed, trust_remote_code=self.trust_remote_code))

    def load_rows(self) -> tuple[list[GroupRow], list[GroupRow]]:
        return read_groups(self.data / TRAIN_FILE), read_groups(self.data / HELD_OUT_FILE)

    def length(self, row: GroupRow) -> int:
        return max(len(sequence) for sequence in row.sequences)

    def tokens(self, row: GroupRow) -> int:
        return sum(len(sequence) for sequence in row.sequences)

    def weight(self, row: GroupRow) -> int:
        return 1

    def loss(self, engine: Any, rows: Sequence[GroupRow], device: torch.device) -> torch.Tensor:
        batch = collate_groups(rows, device)
        scores_N = engine(batch.ids_NS, batch.attention_NS)
        return group_bradley_terry_loss(scores_N, batch.group_sizes, score_l2=self.score_l2, num_groups=1)

    def evaluate(self, engine: Any, rows: Sequence[GroupRow], device: torch.device) -> dict[str, float]:
        batch = collate_groups(rows, device)
        scores_N = engine(batch.ids_NS, batch.attention_NS).cpu()
        hits, pairs = pair_hits(scores_N, batch.group_sizes)
        best_hits, groups = best_worst_hits(scores_N, batch.group_sizes)
        return {
            "loss": float(group_bradley_terry_loss(scores_N, batch.group_sizes, score_l2=self.score_l2, num_groups=1)),
            "hits": hits,
            "pairs": pairs,
            "best_hits": best_hits,
            "groups": groups,
            "scores": float(scores_N.sum()),
            "squares": float(scores_N.square().sum()),
            "replies": len(scores_N),
        }

    def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        mean = sums["scores"] / sums["replies"]
        return {
            "loss": sums["loss"] / sums["groups"],
            "pair_accuracy": sums["hits"] / sums["pairs"],
            "best_vs_worst": sums["best_hits"] / sums["groups"],
            "score_mean": mean,
            "score_std": max(0.0, sums["squares"] / sums["replies"] - mean**2) ** 0.5,
        }

    def export(self, model: nn.Module, folder: Path) -> None:
        assert isinstance(model, SequenceScores)
        save_reward_model(model.reward_model, load_tokenizer(self.sft_path, self.trust_remote_code), folder, reward_offset=0.0)


def train_reward_model(recipe: Recipe, run: RunFolder, tracker: RunTracker, prepared: Prepared, *, sft_path: str) -> dict[str, Any]:
    """Train on the trunk of `sft_path` and leave `DIR/rm/model`, its reward_offset still 0; returns the results, for the caller to commit.

    An unfinished stage goes on from its last checkpoint. Results, on held-out groups:
    pair_accuracy, best_vs_worst, length_baseline (pair accuracy of reply length, oriented on the training groups), loss,
    score_mean, score_std, loss_before; and steps, tokens, tokens_per_second, train_seconds.
    Raises DataError without groups on either side of the split, and what `app.workers.training.fit` raises.
    """
    require_context(prepared.context, recipe.data.max_length, "data.max_length")
    data, corpus = run.stage("rm") / "data", prepared.corpus
    groups, held_out_groups = (_best_replies(side.groups, recipe.rm.max_replies) for side in (corpus.train, corpus.validation))
    require_rows("reward model", "ranked groups", groups, held_out_groups)
    write_groups(encode_groups(groups, prepared.template, recipe.data.max_length), data / TRAIN_FILE)
    write_groups(encode_groups(held_out_groups, prepared.template, recipe.data.max_length), data / HELD_OUT_FILE)
    task = RewardModelTask(data, sft_path, recipe.run.seed, recipe.rm.score_l2, recipe.model.trust_remote_code)
    result = train(task, recipe.rm, recipe, rows=len(groups), folder=run.stage("rm"), tracker=tracker)
    baseline = length_baseline(groups, held_out_groups)
    return {**result.after, "loss_before": result.before["loss"], "length_baseline": baseline, **speed(result)}


def set_reward_offset(
    model_folder: Path,
    sequences: Sequence[IntArray],
    workers: WorkersConfig,
    *,
    deadline_seconds: float,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    trust_remote_code: bool = False,
) -> float:
    """Make the mean score of `sequences` (prompt + answer of the SFT model, int32 [S] each) 0: store their mean raw score as
    `reward_offset` in the folder's config.json, in one step, and return it.

    Scores are computed in a Ray task with the resources of one of `workers`. Raises CorralError or DeadlineError.
    """
    task = ray.remote(mean_raw_score).options(**process_options(workers))
    reference = task.remote(str(model_folder.absolute()), list(sequences), workers.threads, precision, trust_remote_code)
    offset: float = collect([reference], phase="reward offset", deadline_seconds=deadline_seconds, failure=CorralError)[0]
    file = model_folder / "config.json"
    write_json(file, read_json(file) | {"reward_offset": offset})
    return offset


@torch.no_grad()
def mean_raw_score(
    model_folder: str, sequences: Sequence[IntArray], threads: int, precision: Literal["fp32", "bf16", "fp16"], trust_remote_code: bool
) -> float:
    """Mean over `sequences` of the reward model's logit, without any offset."""
    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_reward_model(model_folder, precision=precision, trust_remote_code=trust_remote_code).to(device)
    total = 0.0
    for index in padded_batches(sequences, SCORING_TOKENS):
        total += float(sequence_scores(model, *pad_sequences([sequences[i] for i in index], device)).double().sum())
    return total / len(sequences)


def _best_replies(groups: Sequence[RankedGroup], limit: int) -> list[RankedGroup]:
    """Each group's `limit` best replies."""
    return [replace(group, replies=group.replies[:limit], gold=None if group.gold is None else group.gold[:limit]) for group in groups]
