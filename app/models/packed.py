"""Forward passes over sequences that stand behind each other in one row: no padding is computed, and no [B, S] tensor is made.

For models with attention by segment (app.models.segments).
Shape legend: B sequences, N tokens of all of them, P = N - B that predict another, n of them in one chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from app.experience import IntArray
from app.models.forward import LOGITS_PER_CHUNK
from app.numerics.logprobs import label_logprobs


@dataclass(frozen=True)
class PackedRow:
    """Sequences in one row. positions_1N restarts at 0 where a sequence begins; both int64."""

    ids_1N: torch.Tensor
    positions_1N: torch.Tensor
    lengths: list[int]

    @property
    def last_B(self) -> torch.Tensor:
        """Where the last token of each sequence stands, int64."""
        return torch.tensor(self.lengths, device=self.ids_1N.device).cumsum(0) - 1

    @property
    def inputs(self) -> dict[str, Any]:
        """What the model or its trunk is called with."""
        return {"input_ids": self.ids_1N, "position_ids": self.positions_1N, "segments": self.lengths, "use_cache": False}


def pack_sequences(sequences: Sequence[IntArray], device: torch.device | str = "cpu") -> PackedRow:
    """Int arrays [s_b], none of them empty."""
    ids_N = torch.as_tensor(np.concatenate(sequences).astype("int64"))
    positions_N = torch.as_tensor(np.concatenate([np.arange(len(ids), dtype=np.int64) for ids in sequences]))
    return PackedRow(ids_N[None].to(device), positions_N[None].to(device), [len(ids) for ids in sequences])


def packed_batches(sequences: Sequence[IntArray], max_tokens: int) -> list[list[int]]:
    """Group sequences in their order, so that no group has more than max_tokens tokens; a longer sequence is a group of its own.

    >>> packed_batches([np.zeros(3), np.zeros(2), np.zeros(4), np.zeros(9), np.zeros(1)], max_tokens=6)
    [[0, 1], [2], [3], [4]]
    """
    batches: list[list[int]] = []
    room = 0
    for index, sequence in enumerate(sequences):
        if not batches or len(sequence) > room:
            batches.append([])
            room = max_tokens
        batches[-1].append(index)
        room -= len(sequence)
    return batches


def packed_hidden_states(trunk: nn.Module, row: PackedRow) -> torch.Tensor:
    """Final hidden states [N, H] of a decoder without its head."""
    return trunk(**row.inputs).last_hidden_state[0]


def packed_logprobs(model: PreTrainedModel, row: PackedRow, *, temperature: float = 1.0, chunk_tokens: int | None = None) -> torch.Tensor:
    """Log p(ids[t+1] | ids[..t]) of each sequence at a temperature, float32 [N - B], one sequence behind the other.

    For models whose logits are what the output head gives (see `app.models.forward.transforms_logits`). The head runs over at most
    `chunk_tokens` tokens at a time (default: LOGITS_PER_CHUNK / V).
    """
    chunk = chunk_tokens or max(1, LOGITS_PER_CHUNK // model.config.get_text_config().vocab_size)
    predicts_N = torch.ones_like(row.ids_1N[0], dtype=torch.bool)
    predicts_N[row.last_B] = False
    hidden_PH = packed_hidden_states(model.base_model, row)[predicts_N]
    targets_P = row.ids_1N[0].roll(-1)[predicts_N]
    head = model.get_output_embeddings()
    pieces = zip(hidden_PH.split(chunk), targets_P.split(chunk), strict=True)
    return torch.cat([label_logprobs(head(hidden_nH)[None], targets_n[None], temperature)[0] for hidden_nH, targets_n in pieces])
