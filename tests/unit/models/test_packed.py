"""Sequences that begin alike, in one row: what they share is computed once, and everything is what each sequence alone would give."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from app.models.forward import hidden_states, packed_logprobs, pad_sequences
from app.models.packed import LEAST_SHARED, pack_sequences, packed_batches
from app.models.segments import attend_by_segment

VOCABULARY = 64
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
GROUPED = {"num_key_value_heads": 2}
CONFIGS = {
    "neox": GPTNeoXConfig(**SIZES, hidden_dropout=0.0, attention_dropout=0.0),
    "llama": LlamaConfig(**SIZES, **GROUPED),
    "learned positions": GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.2),
    "sliding": MistralConfig(**SIZES, **GROUPED, sliding_window=7),
    "partly sliding": Qwen2Config(**SIZES, **GROUPED, use_sliding_window=True, sliding_window=20, max_window_layers=1),
    "qwen3": Qwen3Config(**SIZES, **GROUPED, head_dim=8),
}
OWN = {20: (5, 12, 1), 0: (4, 7), 30: (1, 3, 8)}
"""Of each group by the length of its beginning: own tokens of each sequence. The longest beginning goes on from the next longest."""


def sequences() -> list[np.ndarray]:
    """Groups in turns; two of them begin alike, one goes on for longer; the last two are the same."""
    generator = np.random.default_rng(0)
    beginning = generator.integers(1, VOCABULARY, max(OWN))
    found = []
    for turn in range(3):
        for shared, owns in OWN.items():
            if turn < len(owns):
                start = [] if not shared else beginning[:shared]
                found.append(np.array([*start, *generator.integers(1, VOCABULARY, owns[turn])], np.int32))
    return [*found, found[0].copy(), found[0].copy()]


def build(config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32).eval()


def gradients(model: PreTrainedModel, states: list[torch.Tensor]) -> list[torch.Tensor]:
    loss = sum((number + 1) * state.pow(3).sum() for number, state in enumerate(states))
    return list(torch.autograd.grad(loss, list(model.base_model.parameters())))


def assert_same_gradients(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    largest = max(float(wanted.abs().max()) for wanted in expected)
    for found, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5 * largest, rtol=0)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_states_and_gradients_are_those_of_each_sequence_alone(config: Any) -> None:
    model = build(config)
    alone = [model.base_model(torch.from_numpy(ids.astype(np.int64))[None]).last_hidden_state[0] for ids in sequences()]
    expected = gradients(model, alone)
    assert attend_by_segment(model)
    ids_BS, attention_BS = pad_sequences(sequences())
    together = [states[mask] for states, mask in zip(hidden_states(model.base_model, ids_BS, attention_BS), attention_BS, strict=True)]
    for found, wanted in zip(together, alone, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert_same_gradients(gradients(model, together), expected)


@pytest.mark.parametrize("chunk_tokens", [None, 5])
@torch.no_grad()
def test_logprobs_are_those_of_each_sequence_alone(chunk_tokens: int | None) -> None:
    model = build(CONFIGS["llama"])
    alone = []
    for ids in sequences():
        ids_S = torch.from_numpy(ids.astype(np.int64))
        logprobs_RV = (model(ids_S[None]).logits[0, :-1] / 0.7).log_softmax(-1)
        alone.append(logprobs_RV.gather(-1, ids_S[1:, None])[:, 0])
    attend_by_segment(model)
    found = packed_logprobs(model, pack_sequences(sequences()), temperature=0.7, chunk_tokens=chunk_tokens)
    torch.testing.assert_close(found, torch.cat(alone), atol=1e-5, rtol=0)


def test_each_shared_token_is_computed_once() -> None:
    model = build(CONFIGS["llama"])
    attend_by_segment(model)
    seen = []
    model.base_model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[:2]))
    hidden_states(model.base_model, *pad_sequences(sequences()))
    assert seen == [(1, max(OWN) + sum(sum(own) for own in OWN.values()) + 2)]  # of the two that are the same, the last token of each


def test_what_begins_differently_stands_as_it_was_given() -> None:
    few = [np.array([*range(1, LEAST_SHARED), own], np.int32) for own in (40, 50)] + [np.array([9], np.int32)]
    row = pack_sequences(few)
    assert row.where_M is None and [segment.shared for segment in row.segments] == [0, 0, 0]
    assert row.ids_1N[0].tolist() == np.concatenate(few).tolist()


@settings(deadline=None)
@given(
    lengths=st.lists(st.tuples(st.sampled_from([0, 0, 16, 17, 25]), st.integers(1, 6), st.integers(0, 2)), min_size=1, max_size=9),
)
def test_every_token_is_found_in_the_row_again(lengths: list[tuple[int, int, int]]) -> None:
    found = [np.array([*range(100, 100 + shared), *([own] * size)], np.int32) for shared, size, own in lengths]
    row = pack_sequences(found)
    assert row.of_tokens(row.ids_1N[0]).tolist() == np.concatenate(found).tolist()
    assert row.of_tokens(row.positions_1N[0]).tolist() == [place for ids in found for place in range(len(ids))]
    assert sum(segment.tokens for segment in row.segments) == row.ids_1N.numel()
    assert min(segment.tokens for segment in row.segments) >= 1


def test_what_begins_alike_shares_a_pass() -> None:
    batches = packed_batches(sequences(), 100)
    assert sorted(index for batch in batches for index in batch) == list(range(len(sequences())))
    computed = sum(pack_sequences([sequences()[index] for index in batch]).ids_1N.numel() for batch in batches)
    assert computed <= sum(map(len, sequences())) - 3 * 20


def test_gradient_checkpointing_changes_nothing() -> None:
    model = build(CONFIGS["llama"])
    attend_by_segment(model)
    batch = pad_sequences(sequences())
    expected = gradients(model, list(hidden_states(model.base_model, *batch)))
    model.gradient_checkpointing_enable()
    model.train()
    assert_same_gradients(gradients(model, list(hidden_states(model.base_model, *batch))), expected)


def test_a_saved_model_is_an_ordinary_one(tmp_path: Path) -> None:
    model = build(CONFIGS["neox"])
    attend_by_segment(model)
    model.save_pretrained(tmp_path)
    assert "segment" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    assert AutoConfig.from_pretrained(tmp_path)._attn_implementation != model.config._attn_implementation
    again, (ids_BS, attention_BS) = AutoModelForCausalLM.from_pretrained(tmp_path).eval(), pad_sequences(sequences())
    expected = hidden_states(model.base_model, ids_BS, attention_BS)[attention_BS]
    torch.testing.assert_close(hidden_states(again.base_model, ids_BS, attention_BS)[attention_BS], expected, atol=1e-5, rtol=0)


def test_a_model_with_other_attention_keeps_it() -> None:
    assert not attend_by_segment(build(LlamaConfig(**SIZES, **GROUPED, attn_implementation="eager")))
