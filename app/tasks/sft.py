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
from app.data.batch_order import RowShape
from app.data.collate import LENGTH_MULTIPLE, SftBatch, collate_threads
from app.data.token_cache import HELD_OUT_FILE, TRAIN_FILE, SftRow, read_threads
from app.models.forward import target_logits
from app.models.load import load_causal_lm, load_tokenizer
from app.models.residual_dropout import add_residual_dropout
from app.models.saving import save_folder
from app.models.segments import attend_by_segment
from app.models.trainable import choose_trainable, merged_state
from app.numerics import label_logprobs


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

    def forward(
        self, ids_BS: torch.Tensor, positions_BS: torch.Tensor, targets_BS: torch.Tensor, *, count_hits: bool = False
    ) -> torch.Tensor:
        """Scalar float32; the arguments are those of `target_logits`.

        With `count_hits` [2]: the loss, and how many target tokens are the ones that the model finds likeliest.
        """
        logits_NV, ids_N = target_logits(self.language_model, ids_BS, positions_BS, targets_BS)
        logprobs_N = label_logprobs(logits_NV[None], ids_N[None])[0]
        loss = -logprobs_N.sum()
        if count_hits:
            return torch.stack([loss, (logits_NV.argmax(-1) == ids_N).sum().to(loss.dtype)])
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

    def shape(self, row: SftRow) -> RowShape:
        return RowShape(1, len(row.ids), len(row.ids))

    def padded(self, engine: Any) -> bool:
        return not (self.config.packing and engine.module.packs)

    def weight(self, row: SftRow) -> int:
        return int(row.loss_mask[1:].sum())

    def loss(self, engine: Any, rows: Sequence[SftRow], device: torch.device) -> torch.Tensor:
        loss: torch.Tensor = engine(*self._batch(engine, rows, device))
        return loss

    def _batch(self, engine: Any, rows: Sequence[SftRow], device: torch.device) -> SftBatch:
        return collate_threads(rows, device, packed=not self.padded(engine), multiple=self.multiple)

    def evaluate(self, engine: Any, rows: Sequence[SftRow], device: torch.device) -> dict[str, float]:
        loss, hits = engine(*self._batch(engine, rows, device), count_hits=True).tolist()
        return {"loss": loss, "hits": hits, "tokens": sum(self.weight(row) for row in rows)}

    def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        return {"loss": sums["loss"] / sums["tokens"], "accuracy": sums["hits"] / sums["tokens"]}

    def export(self, model: nn.Module, folder: Path) -> None:
        assert isinstance(model, TargetLoss)
        tokenizer = load_tokenizer(self.model_path, self.trust_remote_code)
        save_folder(folder, model.language_model, tokenizer, state_dict=merged_state(model.language_model))
