"""The SFT stage: a causal language model fine-tuned on the assistant turns of conversations.

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

from app.config.recipe import Recipe
from app.data.collate import collate_threads
from app.data.token_cache import SftRow, encode_threads, read_threads, write_threads
from app.models.context import require_context
from app.models.forward import positions
from app.models.load import load_causal_lm, load_tokenizer
from app.numerics.logprobs import token_logprobs
from app.run_folder import RunFolder
from app.stages.preparation import Prepared
from app.stages.supervised import HELD_OUT_FILE, TRAIN_FILE, require_rows, speed, train
from app.tracking import RunTracker


class TargetLoss(nn.Module):
    """A causal language model whose forward is the summed cross-entropy of its target tokens, in nats."""

    def __init__(self, language_model: PreTrainedModel) -> None:
        super().__init__()
        self.language_model = language_model

    def forward(self, ids_BS: torch.Tensor, attention_BS: torch.Tensor, targets_BS: torch.Tensor) -> torch.Tensor:
        """Scalar float32; rows are right-padded, targets_BS is False at a row's first token."""
        logits_BSV = self.language_model(
            input_ids=ids_BS, attention_mask=attention_BS, position_ids=positions(attention_BS), use_cache=False
        ).logits
        return -token_logprobs(logits_BSV, ids_BS).masked_fill(~targets_BS[:, 1:], 0.0).sum()


@dataclass(frozen=True)
class SftTask:
    """`SupervisedTask` over the parquet files in `data`. The loss is the mean over all target tokens of an optimizer step."""

    data: Path
    model_path: str
    precision: Literal["fp32", "bf16", "fp16"]
    trust_remote_code: bool
    stage: str = "sft"

    def build_model(self) -> nn.Module:
        return TargetLoss(load_causal_lm(self.model_path, self.precision, self.trust_remote_code))

    def load_rows(self) -> tuple[list[SftRow], list[SftRow]]:
        return read_threads(self.data / TRAIN_FILE), read_threads(self.data / HELD_OUT_FILE)

    def length(self, row: SftRow) -> int:
        return len(row.ids)

    def tokens(self, row: SftRow) -> int:
        return len(row.ids)

    def weight(self, row: SftRow) -> int:
        return int(row.loss_mask[1:].sum())

    def loss(self, engine: Any, rows: Sequence[SftRow], device: torch.device) -> torch.Tensor:
        loss: torch.Tensor = engine(*collate_threads(rows, device))
        return loss

    def evaluate(self, engine: Any, rows: Sequence[SftRow], device: torch.device) -> dict[str, float]:
        return {"loss": float(self.loss(engine, rows, device)), "tokens": sum(self.weight(row) for row in rows)}

    def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        return {"loss": sums["loss"] / sums["tokens"]}

    def export(self, model: nn.Module, folder: Path) -> None:
        assert isinstance(model, TargetLoss)
        model.language_model.save_pretrained(folder)
        load_tokenizer(self.model_path, self.trust_remote_code).save_pretrained(folder)


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
    task = SftTask(data, prepared.model_path, recipe.model.precision, recipe.model.trust_remote_code)
    result = train(task, recipe.sft, recipe, rows=len(rows), folder=run.stage("sft"), tracker=tracker)
    return {"eval_loss_before": result.before["loss"], "eval_loss_after": result.after["loss"], **speed(result)}
