"""What a reward model learns: rankings, by Bradley-Terry, and the mean score that becomes its zero.

Shape legend: N replies of all groups of a micro-batch, S tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from app.config.training import RewardModelConfig
from app.data.batch_order import RowShape
from app.data.collate import LENGTH_MULTIPLE, collate_groups
from app.data.token_cache import HELD_OUT_FILE, TRAIN_FILE, GroupRow, read_groups
from app.experience import IntArray
from app.models.forward import pad_sequences, padded_batches
from app.models.heads import has_score_head, init_reward_model, load_reward_model, save_reward_model, sequence_scores
from app.models.load import load_tokenizer
from app.models.residual_dropout import add_residual_dropout
from app.models.segments import attend_by_segment
from app.models.trainable import choose_trainable
from app.numerics import group_bradley_terry_loss, pair_bradley_terry_loss, ranking_metrics, ranking_sums

SCORING_TOKENS = 8192
"""Tokens (with padding) of one forward pass when the offset is measured."""


class SequenceScores(nn.Module):
    """A reward model whose forward is the raw score of each reply.

    With `sharing`, where the model allows it, what the replies of a group begin with is computed once.
    """

    def __init__(self, reward_model: PreTrainedModel, *, sharing: bool) -> None:
        super().__init__()
        self.reward_model = reward_model
        self.sharing = sharing and has_score_head(reward_model) and attend_by_segment(reward_model)

    def forward(self, ids_NS: torch.Tensor, attention_NS: torch.Tensor) -> torch.Tensor:
        """Raw logits float32 [N] of a `GroupBatch`."""
        return sequence_scores(self.reward_model, ids_NS, attention_NS)


@dataclass(frozen=True)
class RewardModelTask:
    """`SupervisedTask` over the parquet files in `data`. The loss is the mean over all groups, or all pairs, of an optimizer step."""

    data: Path
    sft_path: str
    seed: int
    trust_remote_code: bool
    config: RewardModelConfig = RewardModelConfig()
    stage: str = "rm"
    multiple: int = LENGTH_MULTIPLE

    def build_model(self) -> nn.Module:
        model = init_reward_model(self.sft_path, seed=self.seed, pooling=self.config.pooling, trust_remote_code=self.trust_remote_code)
        choose_trainable(model, self.config, seed=self.seed)
        add_residual_dropout(model, self.config.residual_dropout, lima=self.config.residual_dropout_lima)
        sharing = self.config.share_prefix
        return SequenceScores(model, sharing=not torch.cuda.is_available() if sharing is None else sharing)

    def load_rows(self) -> tuple[Sequence[GroupRow], Sequence[GroupRow]]:
        return read_groups(self.data / TRAIN_FILE), read_groups(self.data / HELD_OUT_FILE)

    def shape(self, row: GroupRow) -> RowShape:
        lengths = [len(sequence) for sequence in row.sequences]
        return RowShape(len(lengths), max(lengths), sum(lengths))

    def padded(self, engine: Any) -> bool:
        return not engine.module.sharing

    def weight(self, row: GroupRow) -> int:
        replies = len(row.sequences)
        return 1 if self.config.loss == "group" else replies * (replies - 1) // 2

    def loss(self, engine: Any, rows: Sequence[GroupRow], device: torch.device) -> torch.Tensor:
        batch = collate_groups(rows, device, multiple=self.multiple)
        return self._loss(engine(batch.ids_NS, batch.attention_NS), batch.group_sizes)

    def evaluate(self, engine: Any, rows: Sequence[GroupRow], device: torch.device) -> dict[str, float]:
        batch = collate_groups(rows, device, multiple=self.multiple)
        scores_N = engine(batch.ids_NS, batch.attention_NS).cpu()
        return {"loss": float(self._loss(scores_N, batch.group_sizes)), **ranking_sums(scores_N, batch.group_sizes)}

    def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        weights = sums["groups"] if self.config.loss == "group" else sums["pairs"]
        return {"loss": sums["loss"] / weights, **ranking_metrics(sums)}

    def _loss(self, scores_N: torch.Tensor, group_sizes: Sequence[int]) -> torch.Tensor:
        """Summed over what `weight` counts."""
        terms = {"score_l2": self.config.score_l2, "margin": self.config.margin}
        if self.config.loss == "group":
            return group_bradley_terry_loss(scores_N, group_sizes, num_groups=1, **terms)
        return pair_bradley_terry_loss(scores_N, group_sizes, num_pairs=1, **terms)

    def export(self, model: nn.Module, folder: Path) -> None:
        assert isinstance(model, SequenceScores)
        save_reward_model(model.reward_model, load_tokenizer(self.sft_path, self.trust_remote_code), folder, reward_offset=0.0)


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
