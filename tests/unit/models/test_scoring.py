"""Scores, log-probs and logits of sequences that share a pass, with padding and without, against a pass of each alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Gemma2Config, Gemma2ForCausalLM

from app.models.heads import init_reward_model, save_reward_model
from app.models.scoring import ScoringModel
from tests.tiny_models import VOCABULARY, make_bert, make_llama, make_neox, make_tokenizer

LENGTHS = (7, 1, 40, 2, 12, 9, 30)
ALIKE = 20
"""Longer sequences begin with the same so many tokens."""


def rows(lengths: tuple[int, ...] = LENGTHS) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    drawn = [generator.integers(4, VOCABULARY, length).astype(np.int32) for length in lengths]
    beginning = generator.integers(4, VOCABULARY, ALIKE)
    for ids in drawn:
        if len(ids) > ALIKE:
            ids[:ALIKE] = beginning
    return drawn


def make_gemma(folder: Path) -> str:
    """Its logits are capped, and its attention scores, too: it cannot be packed."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    Gemma2ForCausalLM(Gemma2Config(**sizes, **heads)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("make", [make_neox, make_gemma], ids=["neox", "gemma"])
def test_a_sequence_of_one_token_has_no_logprobs(make: Callable[[Path], str], tmp_path: Path) -> None:
    assert [row.shape for row in ScoringModel(make(tmp_path), "reference").answers(rows((1, 1)), 48)] == [(0,), (0,)]


@pytest.mark.parametrize(("make", "packs"), [(make_neox, True), (make_llama, True), (make_gemma, False)], ids=["neox", "llama", "gemma"])
@torch.no_grad()
def test_logprobs_and_logits_equal_a_pass_of_each_sequence_alone(make: Callable[[Path], str], packs: bool, tmp_path: Path) -> None:
    folder = make(tmp_path)
    model = ScoringModel(folder, "reference", temperature=0.7)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert model.packs == packs
    passes: list[int] = []
    padding: list[int] = []
    logprobs = model.answers(rows(), 48, passes.append, on_padding=padding.append)
    logits = model.answers(rows(), 48, output="logits")
    assert sum(passes) == len(LENGTHS) and len(passes) > 1 and (sum(padding) == 0) == packs
    for ids, logprobs_R, logits_SV in zip(rows(), logprobs, logits, strict=True):
        exact_SV = plain(torch.from_numpy(ids.astype("int64"))[None]).logits[0]
        np.testing.assert_allclose(logits_SV, exact_SV.half(), atol=2e-3, rtol=2e-3)
        exact_RV = (exact_SV[:-1] / 0.7).log_softmax(-1).numpy()
        np.testing.assert_allclose(logprobs_R, exact_RV[np.arange(len(ids) - 1), ids[1:]], atol=1e-5)


@pytest.mark.parametrize(("make", "pooling"), [(make_neox, "last"), (make_llama, "mean"), (make_bert, "last")])
@torch.no_grad()
def test_rewards_equal_a_pass_of_each_sequence_alone(make: Callable[[Path], str], pooling: str, tmp_path: Path) -> None:
    save_reward_model(init_reward_model(make(tmp_path / "trunk"), seed=1, pooling=pooling), make_tokenizer(), tmp_path / "reward", 0.25)
    model = ScoringModel(str(tmp_path / "reward"), "reward")
    assert model.packs == (make is not make_bert)
    together, alone = model.answers(rows(), 1000), [model.answers([ids], 1000)[0] for ids in rows()]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert np.std(together) > 0.01
    if pooling == "last":  # plain transformers knows no other
        plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward", dtype=torch.float32).eval()
        exact = [float(plain(torch.from_numpy(ids.astype("int64"))[None]).logits) - 0.25 for ids in rows()]
        np.testing.assert_allclose(np.concatenate(together), exact, atol=1e-5)


def test_how_sequences_are_packed_does_not_change_the_weights_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_llama(tmp_path)
    packed = ScoringModel(folder, "reference").weights_hash
    monkeypatch.setattr("app.models.scoring.attend_by_segment", lambda model: False)
    assert ScoringModel(folder, "reference").weights_hash == packed
