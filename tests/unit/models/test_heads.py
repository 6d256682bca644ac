"""Reward models and critics against plain transformers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from app.errors import ModelError
from app.models.forward import pad_sequences
from app.models.heads import ValueModel, init_reward_model, load_reward_model, reward_offset, save_reward_model, sequence_scores
from tests.tiny_models import VOCABULARY, make_llama, make_neox, make_reward_model, make_tokenizer

OFFSET = 0.375


def random_sequences(lengths: tuple[int, ...] = (7, 1, 12, 2)) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(4, VOCABULARY, length).astype(np.int32) for length in lengths]


@pytest.fixture(scope="module", params=[make_neox, make_llama], ids=["neox", "llama"])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A causal LM and a reward model on its trunk."""
    root = tmp_path_factory.mktemp("folders")
    causal_lm = request.param(root / "sft")
    return causal_lm, make_reward_model(root / "rm", causal_lm, seed=3, reward_offset=OFFSET)


@torch.no_grad()
def test_scores_equal_plain_transformers(folders: tuple[str, str]) -> None:
    plain = AutoModelForSequenceClassification.from_pretrained(folders[1]).eval()
    assert plain.config.num_labels == 1
    sequences = random_sequences()
    ids_BS, attention_BS = pad_sequences(sequences)
    padded = ids_BS.masked_fill(~attention_BS, plain.config.pad_token_id)
    scores = sequence_scores(load_reward_model(folders[1]), ids_BS, attention_BS)
    assert scores.dtype == torch.float32
    assert scores.std() > 0.05
    torch.testing.assert_close(scores, plain(input_ids=padded, attention_mask=attention_BS).logits[:, 0], atol=1e-5, rtol=0)


@torch.no_grad()
def test_scores_do_not_depend_on_padding(folders: tuple[str, str]) -> None:
    model = load_reward_model(folders[1])
    sequences = random_sequences()
    together = sequence_scores(model, *pad_sequences(sequences))
    alone = torch.cat([sequence_scores(model, *pad_sequences([ids])) for ids in sequences])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    ids_BS, attention_BS = pad_sequences(sequences)
    other_padding = ids_BS.masked_fill(~attention_BS, 200)
    torch.testing.assert_close(sequence_scores(model, other_padding, attention_BS), together, atol=1e-5, rtol=0)
    left_ids = torch.cat([torch.full((1, 5), 9), ids_BS[:1, :7]], dim=1)
    torch.testing.assert_close(sequence_scores(model, left_ids, torch.arange(12)[None] >= 5), together[:1], atol=1e-5, rtol=0)


def test_the_folder_holds_all_that_a_scorer_needs(folders: tuple[str, str]) -> None:
    folder = Path(folders[1])
    config = json.loads((folder / "config.json").read_text())
    assert config["reward_offset"] == OFFSET
    assert config["pad_token_id"] == 0
    assert (folder / "model.safetensors").is_file()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template
    assert tokenizer.pad_token_id == 0
    assert tokenizer.padding_side == "right"
    assert reward_offset(load_reward_model(str(folder))) == OFFSET


def test_the_head_is_drawn_by_seed_and_nothing_drops_out(folders: tuple[str, str]) -> None:
    first, again, other = (init_reward_model(folders[0], seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.score.weight, again.score.weight)
    assert not torch.equal(first.score.weight, other.score.weight)
    assert 0.5 / 33**0.5 < first.score.weight.std() < 2 / 33**0.5
    ids_BS, attention_BS = pad_sequences(random_sequences())
    first.train()
    torch.testing.assert_close(sequence_scores(first, ids_BS, attention_BS), sequence_scores(again, ids_BS, attention_BS))


def test_a_tokenizer_that_pads_with_its_end_token_gets_another_padding_token(tmp_path: Path) -> None:
    causal_lm = make_neox(tmp_path / "sft")
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(causal_lm)
    model = init_reward_model(causal_lm, seed=0)
    assert model.config.pad_token_id not in (None, tokenizer.eos_token_id)
    save_reward_model(model, tokenizer, tmp_path / "rm", 0.0)
    assert AutoTokenizer.from_pretrained(tmp_path / "rm").pad_token_id == model.config.pad_token_id
    ends = np.array([5, 6, tokenizer.eos_token_id], dtype=np.int32)
    ids_BS, attention_BS = pad_sequences([ends, random_sequences((6,))[0]])
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    padded = ids_BS.masked_fill(~attention_BS, model.config.pad_token_id)
    torch.testing.assert_close(sequence_scores(model, ids_BS, attention_BS), plain(padded, attention_mask=attention_BS).logits[:, 0])


def test_a_causal_lm_is_no_reward_model(folders: tuple[str, str]) -> None:
    with pytest.raises(ModelError, match="one label"):
        load_reward_model(folders[0])


@torch.no_grad()
def test_a_copied_critic_values_the_last_token_as_the_scorer_does(folders: tuple[str, str]) -> None:
    sequences = random_sequences()
    ids_BS, attention_BS = pad_sequences(sequences)
    critic = ValueModel.from_reward_model(folders[1]).eval()
    values_BS = critic(ids_BS, attention_BS)
    assert values_BS.shape == ids_BS.shape
    assert values_BS.dtype == torch.float32
    last = values_BS[torch.arange(len(sequences)), attention_BS.sum(1) - 1]
    scores = sequence_scores(load_reward_model(folders[1]), ids_BS, attention_BS) - OFFSET
    torch.testing.assert_close(last, scores, atol=1e-5, rtol=0)


def test_every_parameter_of_the_critic_learns_and_reloads(folders: tuple[str, str]) -> None:
    critic = ValueModel.from_reward_model(folders[1])
    ids_BS, attention_BS = pad_sequences(random_sequences())
    critic(ids_BS, attention_BS)[attention_BS].square().sum().backward()
    assert all(parameter.grad is not None for parameter in critic.parameters())
    copy = ValueModel.from_causal_lm(folders[0])
    assert (copy(ids_BS, attention_BS) == 0).all()
    copy.load_state_dict(critic.state_dict())
    torch.testing.assert_close(copy(ids_BS, attention_BS), critic(ids_BS, attention_BS))
