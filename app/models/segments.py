"""Attention over a row that holds several sequences behind each other, one sequence at a time: no [N, N] mask, no work across them.

Shape legend: N tokens of the row, h heads, d head size; s own tokens of one sequence, S tokens that they see.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

BY_SEGMENT = "corral_by_segment"
"""Name of this attention in Transformers. A model that has it needs the keyword `segments` in every call."""

CAUSAL_LAYERS = {"full_attention", "sliding_attention"}


class Segment(NamedTuple):
    """A sequence's part of the row: `tokens` of its own, behind `shared` ones with which the sequence before it begins as well. Those
    stand in the row once: a token's keys and values depend on it and on what comes before it, and that is the same."""

    tokens: int
    shared: int = 0


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


def segments_of(positions_N: torch.Tensor) -> list[Segment]:
    """The sequences of a row, whose positions restart at 0.

    >>> [segment.tokens for segment in segments_of(torch.tensor([0, 1, 2, 0, 0, 1]))]
    [3, 1, 2]
    """
    starts = (positions_N == 0).nonzero().flatten().tolist()
    return [Segment(end - start) for start, end in zip(starts, [*starts[1:], len(positions_N)], strict=True)]


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    segments: Sequence[Segment],
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """query, key and value [1, h, N, d] -> [1, N, h, d], by Transformers' own call of torch for each segment."""
    sizes = [segment.tokens for segment in segments]
    outputs: list[torch.Tensor] = []
    seen_key, seen_value = key, value
    parts = (states.split(sizes, dim=2) for states in (query, key, value))
    for segment, own_query, own_key, own_value in zip(segments, *parts, strict=True):
        seen_key, seen_value = _behind(seen_key, segment.shared, own_key), _behind(seen_value, segment.shared, own_value)
        mask_sS = _mask(segment, sliding_window, query.device)
        outputs.append(sdpa_attention_forward(module, own_query, seen_key, seen_value, mask_sS, **options)[0])
    return torch.cat(outputs, dim=1), None


def _behind(before: torch.Tensor, shared: int, own: torch.Tensor) -> torch.Tensor:
    """What a sequence sees: the `shared` first keys, or values, of the one before it, and its own."""
    return torch.cat([before[:, :, :shared], own], dim=2) if shared else own


def _mask(segment: Segment, width: int | None, device: torch.device) -> torch.Tensor | None:
    """True [s, S] for keys that an own token sees, at most `width` - 1 tokens back; None where plain causality says it."""
    own, shared = segment
    total = own + shared
    if not shared and (width is None or total <= width):
        return None
    seen_sS = torch.ones(own, total, dtype=torch.bool, device=device).tril(shared)
    return seen_sS if width is None else seen_sS.triu(shared + 1 - width)
