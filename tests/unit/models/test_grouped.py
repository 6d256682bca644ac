"""Scores of groups that share a prefix against each reply alone, and which models may be asked for them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    Gemma2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from app.data.collate import GroupBatch, collate_groups
from app.data.token_cache import GroupRow
from app.models.forward import pad_sequences
from app.models.grouped import ARCHITECTURES, can_share_prefix, group_scores, share_prefix
from app.models.heads import sequence_scores

VOCABULARY = 64
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "num_labels": 1,
    "pad_token_id": 0,
}
GROUPED = {"num_key_value_heads": 2}
CONFIGS = [
    GPTNeoXConfig(**SIZES, hidden_dropout=0.0, attention_dropout=0.0),
    LlamaConfig(**SIZES, **GROUPED),
    MistralConfig(**SIZES, **GROUPED, sliding_window=None),
    Qwen2Config(**SIZES, **GROUPED),
    Qwen3Config(**SIZES, **GROUPED, head_dim=8),
]
LENGTHS = ((9, (5, 12, 1)), (0, (4, 7)), (20, (1, 3, 8, 2, 2)), (0, (1, 2)))
"""Shared prefix and own tokens of each reply, group by group."""


def build(config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(copy.deepcopy(config), dtype=torch.float32).eval()


def groups() -> list[GroupRow]:
    generator = np.random.default_rng(0)
    rows = []
    for number, (shared, owns) in enumerate(LENGTHS):
        prefix = generator.integers(1, VOCABULARY, shared)
        # each reply begins with a token of its own, so that the prefix is as long as it is meant to be
        replies = [[start, *generator.integers(1, VOCABULARY, own - 1)] for start, own in enumerate(owns, 1)]
        rows.append(GroupRow(str(number), tuple(np.array([*prefix, *reply], np.int32) for reply in replies)))
    return rows


def grouped(model: PreTrainedModel, batch: GroupBatch) -> torch.Tensor:
    return group_scores(model, batch.ids_NS, batch.attention_NS, batch.own_NS)


def gradients(model: PreTrainedModel, scores_N: torch.Tensor) -> list[torch.Tensor]:
    weights_N = torch.linspace(-1.0, 2.0, len(scores_N))
    return list(torch.autograd.grad((weights_N * scores_N).sum(), list(model.parameters())))


def assert_same_gradients(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    largest = max(float(g.abs().max()) for g in expected)
    for found, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5 * largest, rtol=0)


def test_every_architecture_is_tested() -> None:
    assert {config.model_type for config in CONFIGS} == set(ARCHITECTURES)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_scores_and_gradients_are_those_of_each_reply_alone(config: Any) -> None:
    model = build(config)
    assert can_share_prefix(model)
    alone = torch.cat([sequence_scores(model, *pad_sequences([ids])) for row in groups() for ids in row.sequences])
    expected = gradients(model, alone)
    share_prefix(model)
    scores = grouped(model, collate_groups(groups()))
    assert scores.dtype == torch.float32
    assert alone.std() > 0.05
    torch.testing.assert_close(scores, alone, atol=1e-5, rtol=0)
    assert_same_gradients(gradients(model, scores), expected)


def test_each_shared_token_is_computed_once() -> None:
    model = build(CONFIGS[1])
    share_prefix(model)
    seen = []
    model.base_model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[:2]))
    grouped(model, collate_groups(groups()))
    assert seen == [(1, sum(shared + sum(owns) for shared, owns in LENGTHS))]


def test_identical_replies_keep_a_last_token_each() -> None:
    model = build(CONFIGS[0])
    same = np.arange(1, 8, dtype=np.int32)
    rows = [GroupRow("same", (same, same.copy())), GroupRow("one begins the other", (same[:4], same))]
    alone = torch.cat([sequence_scores(model, *pad_sequences([ids])) for row in rows for ids in row.sequences])
    share_prefix(model)
    torch.testing.assert_close(grouped(model, collate_groups(rows)), alone, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_group_sees_nothing_of_its_neighbours() -> None:
    model = build(CONFIGS[1])
    share_prefix(model)
    together = grouped(model, collate_groups(groups()))
    alone = torch.cat([grouped(model, collate_groups([row])) for row in groups()])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    batch = collate_groups(groups())
    ids_NS = batch.ids_NS.masked_fill(~batch.attention_NS, 7)
    torch.testing.assert_close(group_scores(model, ids_NS, batch.attention_NS, batch.own_NS), together)


def test_gradient_checkpointing_changes_nothing() -> None:
    model = build(CONFIGS[1])
    share_prefix(model)
    batch = collate_groups(groups())
    expected = gradients(model, grouped(model, batch))
    model.gradient_checkpointing_enable()
    model.train()
    assert_same_gradients(gradients(model, grouped(model, batch)), expected)


def test_a_saved_model_is_an_ordinary_one(tmp_path: Path) -> None:
    model = build(CONFIGS[0])
    share_prefix(model)
    model.save_pretrained(tmp_path)
    assert "grouped" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    assert AutoConfig.from_pretrained(tmp_path)._attn_implementation != model.config._attn_implementation
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    batch = collate_groups(groups())
    torch.testing.assert_close(sequence_scores(again, batch.ids_NS, batch.attention_NS), grouped(model, batch), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(**SIZES, **GROUPED, sliding_window=16),
        Qwen2Config(**SIZES, **GROUPED, use_sliding_window=True, sliding_window=16, max_window_layers=1),
        Gemma2Config(**SIZES, **GROUPED, head_dim=8),
        BertConfig(**SIZES),
        LlamaConfig(**SIZES, **GROUPED, attn_implementation="eager"),
        LlamaConfig(**SIZES, **GROUPED, pooling="mean"),
    ],
    ids=["sliding", "partly sliding", "untested", "encoder", "eager", "mean"],
)
def test_other_models_take_the_plain_way(config: Any) -> None:
    assert not can_share_prefix(build(config))
