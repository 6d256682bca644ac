"""What SFT learns: the assistant turns of conversations, by the loss of their tokens.

Shape legend: B threads, S tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from app.config.training import SftConfig
from app.data.collate import LENGTH_MULTIPLE, collate_threads
from app.data.token_cache import HELD_OUT_FILE, TRAIN_FILE, SftRow, read_threads
from app.models.forward import target_logprobs
from app.models.load import load_causal_lm, load_tokenizer
from app.models.residual_dropout import add_residual_dropout
from app.models.segments import attend_by_segment
from app.models.trainable import choose_trainable, merged_state


class TargetLoss(nn.Module):
    """A causal language model whose forward is the summed cross-entropy of its target tokens, in nats.

    `packs`: whether a row may hold several threads. While it trains, `poly_eps` times (1 - p) is added for each token (PolyLoss,
    https://arxiv.org/abs/2204.12511).
    """

    def __init__(self, language_model: PreTrainedModel, poly_eps: float = 0.0) -> None:
        super().__init__()
        self.language_model = language_model
        self.poly_eps = poly_eps
        self.packs = attend_by_segment(language_model)

    def forward(self, ids_BS: torch.Tensor, positions_BS: torch.Tensor, targets_BS: torch.Tensor) -> torch.Tensor:
        """Scalar float32; the arguments are those of `target_logprobs`."""
        logprobs_N = target_logprobs(self.language_model, ids_BS, positions_BS, targets_BS)
        loss = -logprobs_N.sum()
        return loss + self.poly_eps * (1 - logprobs_N.exp()).sum() if self.training and self.poly_eps else loss


@dataclass(frozen=True)
class SftTask:
    """`SupervisedTask` over the token caches in `data`. The loss is the mean over all target tokens of an optimizer step."""

    data: Path
    model_path: str
    precision: Literal["fp32", "bf16", "fp16"]
    trust_remote_code: bool
    config: SftConfig = SftConfig()
    seed: int = 0
    stage: str = "sft"
    multiple: int = LENGTH_MULTIPLE

    def build_model(self) -> nn.Module:
        model = load_causal_lm(self.model_path, self.precision, self.trust_remote_code)
        choose_trainable(model, self.config, seed=self.seed)
        add_residual_dropout(model, self.config.residual_dropout, lima=self.config.residual_dropout_lima)
        return TargetLoss(model, self.config.poly_eps)

    def load_rows(self) -> tuple[Sequence[SftRow], Sequence[SftRow]]:
        return read_threads(self.data / TRAIN_FILE), read_threads(self.data / HELD_OUT_FILE)

    def length(self, row: SftRow) -> int:
        return len(row.ids)

    def tokens(self, row: SftRow) -> int:
        return len(row.ids)

    def weight(self, row: SftRow) -> int:
        return int(row.loss_mask[1:].sum())

    def loss(self, engine: Any, rows: Sequence[SftRow], device: torch.device) -> torch.Tensor:
        packed = self.config.packing and engine.module.packs
        loss: torch.Tensor = engine(*collate_threads(rows, device, packed=packed, multiple=self.multiple))
        return loss

    def evaluate(self, engine: Any, rows: Sequence[SftRow], device: torch.device) -> dict[str, float]:
        return {"loss": float(self.loss(engine, rows, device)), "tokens": sum(self.weight(row) for row in rows)}

    def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        return {"loss": sums["loss"] / sums["tokens"]}

    def export(self, model: nn.Module, folder: Path) -> None:
        assert isinstance(model, TargetLoss)
        model.language_model.save_pretrained(folder, state_dict=merged_state(model.language_model))
        load_tokenizer(self.model_path, self.trust_remote_code).save_pretrained(folder)
