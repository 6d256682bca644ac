"""Scores of ranked groups, whose replies begin with the same tokens: those go through the model once.

All replies of a micro-batch stand behind each other in one row without padding: the first reply of each group whole, the others
without the tokens that they share with it. Position ids continue from those tokens, and attention adds their keys and values,
so every hidden state is the one that the reply alone would have. Linear layers, most of the work, see each token once.
Shape legend: N replies of all groups, S tokens of the longest, T tokens of the one row, h attention heads, d size of a head,
s tokens of one reply in the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from app.models.forward import positions

ATTENTION = "corral_grouped"
"""The name under which transformers knows `grouped_attention`."""

ARCHITECTURES = ("gpt_neox", "llama", "mistral", "qwen2", "qwen3")
"""`model_type` of decoders for which it is tested: attention by transformers' interface, positions from position ids alone."""


class Span(NamedTuple):
    """One reply in the row: `tokens` of its own, `shared` ones before them that the latest reply with shared = 0 begins with.

    mask_sS is None where nothing is shared, else True where an own token sees one of the shared + tokens keys.
    """

    tokens: int
    shared: int
    mask_sS: torch.Tensor | None


def can_share_prefix(model: PreTrainedModel) -> bool:
    """Whether `group_scores` gives the model's scores: a tested decoder, full attention in every layer, its last token scored."""
    config: PretrainedConfig = model.config
    full = set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    full = full and getattr(config, "sliding_window", None) is None
    last = getattr(config, "pooling", "last") == "last"
    return config.model_type in ARCHITECTURES and full and last and config._attn_implementation in ("sdpa", ATTENTION)


def share_prefix(model: PreTrainedModel) -> None:
    """Make `model`, in place, one for `group_scores` and for nothing else: its attention then needs what `group_scores` hands it."""
    model.set_attn_implementation(ATTENTION)


def group_scores(model: PreTrainedModel, ids_NS: torch.Tensor, attention_NS: torch.Tensor, own_NS: torch.Tensor) -> torch.Tensor:
    """What `sequence_scores` gives, float32 [N], from a model that `share_prefix` has prepared. Carries gradients.

    Rows are padded on the right. own_NS is attention_NS without the tokens that a row begins with as the latest row with
    own = attention does.
    """
    spans = _spans(attention_NS, own_NS)
    output = model.base_model(
        input_ids=ids_NS[own_NS][None], position_ids=positions(attention_NS)[own_NS][None], use_cache=False, spans=spans
    )
    last_N = own_NS.sum(1).cumsum(0) - 1
    return cast(nn.Linear, model.score)(output.last_hidden_state[0, last_N]).squeeze(-1).float()


def grouped_attention(
    module: nn.Module,
    query_1hTd: torch.Tensor,
    key_1hTd: torch.Tensor,
    value_1hTd: torch.Tensor,
    attention_mask: None,
    *,
    spans: Sequence[Span],
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of each reply over the tokens that it shares and its own, [1, T, h, d], by transformers' SDPA attention."""
    sizes = [span.tokens for span in spans]
    outputs, first = [], (key_1hTd, value_1hTd)
    parts = (x.split(sizes, dim=2) for x in (query_1hTd, key_1hTd, value_1hTd))
    for span, query, key, value in zip(spans, *parts, strict=True):
        if span.shared:
            key, value = (torch.cat([whole[:, :, : span.shared], own], dim=2) for whole, own in zip(first, (key, value), strict=True))
        else:
            first = key, value
        outputs.append(sdpa_attention_forward(module, query, key, value, span.mask_sS, **options)[0])
    return torch.cat(outputs, dim=1), None


AttentionInterface.register(ATTENTION, grouped_attention)


def _spans(attention_NS: torch.Tensor, own_NS: torch.Tensor) -> list[Span]:
    spans = []
    for tokens, total in zip(own_NS.sum(1).tolist(), attention_NS.sum(1).tolist(), strict=True):
        shared = total - tokens
        mask_sS = torch.ones(tokens, total, dtype=torch.bool, device=own_NS.device).tril(shared) if shared else None
        spans.append(Span(tokens, shared, mask_sS))
    return spans
