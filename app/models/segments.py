"""Attention over a row that holds several sequences behind each other, one sequence at a time: no [N, N] mask, no work across them.

Shape legend: N tokens of the row, h heads, d head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

BY_SEGMENT = "corral_by_segment"
"""Name of this attention in Transformers. A model that has it needs the keyword `segments` in every call."""

CAUSAL_LAYERS = {"full_attention", "sliding_attention"}


def attend_by_segment(model: PreTrainedModel) -> bool:
    """Give `model` this attention, in place, where that changes no result; returns whether it has it now.

    It fits layers that need no mask but causality and a window: those that Flash Attention runs as well.
    """
    config = model.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or ())
    fits = model._supports_flash_attn and model._supports_attention_backend and layers <= CAUSAL_LAYERS
    if fits and model.config._attn_implementation == "sdpa":
        AttentionInterface.register(BY_SEGMENT, _attention)
        model.set_attn_implementation(BY_SEGMENT)
    return bool(model.config._attn_implementation == BY_SEGMENT)


def segment_lengths(positions_N: torch.Tensor) -> list[int]:
    """Lengths of the sequences of a row, whose positions restart at 0.

    >>> segment_lengths(torch.tensor([0, 1, 2, 0, 0, 1]))
    [3, 1, 2]
    """
    starts = (positions_N == 0).nonzero().flatten().tolist()
    return [end - start for start, end in zip(starts, [*starts[1:], len(positions_N)], strict=True)]


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    segments: Sequence[int],
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """query, key and value [1, h, N, d] -> [1, N, h, d], by Transformers' own call of torch for each segment."""
    parts = zip(*(states.split(list(segments), dim=2) for states in (query, key, value)), strict=True)
    outputs = [sdpa_attention_forward(module, *part, _window(part[0], sliding_window), **options)[0] for part in parts]
    return torch.cat(outputs, dim=1), None


def _window(query: torch.Tensor, width: int | None) -> torch.Tensor | None:
    """Where a segment is longer than the window: True [s, s] for keys at most `width` - 1 tokens back."""
    length = query.shape[2]
    if width is None or length <= width:
        return None
    ones = torch.ones(length, length, dtype=torch.bool, device=query.device)
    return ones.tril().triu(1 - width)
