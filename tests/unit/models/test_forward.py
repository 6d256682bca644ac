"""Batching by length and chunked log-probs, against full logits."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from app.models.forward import hidden_states, pad_sequences, padded_batches, sequence_logprobs
from app.models.segments import attend_by_segment
from tests.tiny_models import VOCABULARY, make_llama, make_neox

LENGTHS = (7, 1, 12, 2, 12, 9)


def random_sequences(lengths: tuple[int, ...] = LENGTHS, vocabulary: int = VOCABULARY) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(4, vocabulary, length).astype(np.int32) for length in lengths]


@pytest.fixture(scope="module", params=[make_neox, make_llama], ids=["neox", "llama"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    folder: Path = tmp_path_factory.mktemp("model")
    return AutoModelForCausalLM.from_pretrained(request.param(folder), dtype=torch.float32).eval()


def test_positions_of_packed_rows_are_those_of_each_sequence() -> None:
    """Rotary embeddings see distances alone; learned positions also tell where a sequence begins."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 16, "initializer_range": 0.2}
    model = GPT2LMHeadModel(GPT2Config(**sizes)).eval()
    ids_BS, attention_BS = pad_sequences(random_sequences())
    padded = hidden_states(model.base_model, ids_BS, attention_BS)[attention_BS]
    assert attend_by_segment(model)
    torch.testing.assert_close(hidden_states(model.base_model, ids_BS, attention_BS)[attention_BS], padded, atol=1e-5, rtol=0)


def literal_logprobs(model: PreTrainedModel, ids: np.ndarray, temperature: float) -> torch.Tensor:
    """One sequence alone, from its full logits, token by token."""
    logits_SV = model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0].float() / temperature
    return torch.tensor([float(logits_SV[t].log_softmax(-1)[ids[t + 1]]) for t in range(len(ids) - 1)])


def test_padded_batches_cover_every_sequence_within_the_budget() -> None:
    sequences = random_sequences((3, 50, 8, 8, 1, 20, 5))
    batches = padded_batches(sequences, max_tokens=24)
    assert sorted(index for batch in batches for index in batch) == list(range(7))
    for batch in batches:
        longest = max(len(sequences[index]) for index in batch)
        assert longest * len(batch) <= 24 or len(batch) == 1
    assert padded_batches([], max_tokens=8) == []


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_states_without_padding_equal_states_with_it(model: PreTrainedModel, left: bool) -> None:
    """Values and gradients, whichever side the padding is on, and with a row that is all padding."""
    ids_BS, attention_BS = pad_sequences(random_sequences())
    attention_BS = attention_BS.clone()
    attention_BS[1] = False
    if left:
        ids_BS, attention_BS = ids_BS.flip(1), attention_BS.flip(1)
    packed = copy.deepcopy(model)
    assert attend_by_segment(packed)
    gradients = []
    for each in (model, packed):
        states = hidden_states(each.base_model, ids_BS, attention_BS)
        if each is packed:
            assert (states[~attention_BS] == 0).all()
        kept = states[attention_BS]
        gradients.append((kept.detach(), torch.autograd.grad(kept.pow(3).sum(), list(each.base_model.parameters()))))
    (padded_states, padded_gradients), (packed_states, packed_gradients) = gradients
    torch.testing.assert_close(packed_states, padded_states, atol=1e-5, rtol=0)
    for packed_gradient, padded_gradient in zip(packed_gradients, padded_gradients, strict=True):
        torch.testing.assert_close(packed_gradient, padded_gradient, atol=1e-5 * float(padded_gradient.abs().max()), rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk_tokens", [None, 5])
@torch.no_grad()
def test_logprobs_equal_full_logits(model: PreTrainedModel, temperature: float, chunk_tokens: int | None) -> None:
    sequences = random_sequences()
    ids_BS, attention_BS = pad_sequences(sequences)
    full = model(input_ids=ids_BS, attention_mask=attention_BS).logits / temperature
    expected = full[:, :-1].log_softmax(-1).gather(-1, ids_BS[:, 1:, None]).squeeze(-1) * attention_BS[:, 1:]
    logprobs = sequence_logprobs(model, ids_BS, attention_BS, temperature=temperature, chunk_tokens=chunk_tokens)
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=0)
    for row, ids in zip(logprobs, sequences, strict=True):
        torch.testing.assert_close(row[: len(ids) - 1], literal_logprobs(model, ids, temperature), atol=1e-5, rtol=0)
        assert (row[len(ids) - 1 :] == 0).all()


@torch.no_grad()
def test_logprobs_do_not_depend_on_the_side_or_content_of_padding(model: PreTrainedModel) -> None:
    ids_BS, attention_BS = pad_sequences(random_sequences((5, 9)))
    right = sequence_logprobs(model, ids_BS, attention_BS)[0, :4]
    left_ids = torch.cat([torch.full((1, 4), 77), ids_BS[:1, :5]], dim=1)
    left_attention = torch.arange(9)[None] >= 4
    left = sequence_logprobs(model, left_ids, left_attention)[0]
    torch.testing.assert_close(left[4:], right, atol=1e-5, rtol=0)
    assert (left[:4] == 0).all()


@torch.no_grad()
def test_a_single_token_predicts_nothing(model: PreTrainedModel) -> None:
    assert sequence_logprobs(model, *pad_sequences(random_sequences((1, 1)))).shape == (2, 0)


def test_gradients_equal_those_of_full_logits(model: PreTrainedModel) -> None:
    ids_BS, attention_BS = pad_sequences(random_sequences())
    parameters = list(model.parameters())
    chunked = torch.autograd.grad(sequence_logprobs(model, ids_BS, attention_BS, chunk_tokens=5).sum(), parameters)
    logits = model(input_ids=ids_BS, attention_mask=attention_BS).logits
    full = (logits[:, :-1].log_softmax(-1).gather(-1, ids_BS[:, 1:, None]).squeeze(-1) * attention_BS[:, 1:]).sum()
    for mine, theirs in zip(chunked, torch.autograd.grad(full, parameters), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_architectures_that_transform_their_logits() -> None:
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        final_logit_softcapping=0.5,
    )
    model = Gemma2ForCausalLM(config).eval()
    sequences = random_sequences(vocabulary=64)
    logprobs = sequence_logprobs(model, *pad_sequences(sequences), chunk_tokens=24)
    for row, ids in zip(logprobs, sequences, strict=True):
        torch.testing.assert_close(row[: len(ids) - 1], literal_logprobs(model, ids, 1.0), atol=1e-5, rtol=0)
