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


def pad_left(sequences: list[np.ndarray], token: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    ids_BS, attention_BS = (part.flip(1) for part in pad_sequences([ids[::-1].copy() for ids in sequences]))
    return ids_BS.masked_fill(~attention_BS, token), attention_BS


def mean_pooled(folders: tuple[str, str], folder: Path) -> str:
    """The reward model of `folders`, reading the mean instead."""
    model = init_reward_model(folders[0], seed=3, pooling="mean")
    save_reward_model(model, make_tokenizer(), folder, OFFSET)
    return str(folder)


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
    left = pad_left(sequences)
    torch.testing.assert_close(sequence_scores(model, *left), together, atol=1e-5, rtol=0)


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


@torch.no_grad()
def test_mean_pooling_reads_every_attended_token_alike(folders: tuple[str, str], tmp_path: Path) -> None:
    model = load_reward_model(mean_pooled(folders, tmp_path / "rm"))
    assert json.loads((tmp_path / "rm" / "config.json").read_text())["pooling"] == "mean"
    sequences = random_sequences()
    literal = []
    for ids in sequences:
        hidden_SH = model.base_model(torch.from_numpy(ids.astype(np.int64))[None]).last_hidden_state[0]
        literal.append(sum(hidden_SH[s] @ model.score.weight[0] for s in range(len(ids))) / len(ids))
    expected = torch.stack(literal)
    assert (expected - sequence_scores(load_reward_model(folders[1]), *pad_sequences(sequences))).abs().max() > 0.05
    torch.testing.assert_close(sequence_scores(model, *pad_sequences(sequences)), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(sequence_scores(model, *pad_left(sequences)), expected, atol=1e-5, rtol=0)


def test_mean_pooling_sends_gradients_to_every_token(folders: tuple[str, str]) -> None:
    model = init_reward_model(folders[0], seed=3, pooling="mean")
    ids_BS, attention_BS = pad_sequences(random_sequences())
    sequence_scores(model, ids_BS, attention_BS).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    rows_V = model.get_input_embeddings().weight.grad.abs().sum(1)
    assert (rows_V[ids_BS[attention_BS]] > 0).all()


@torch.no_grad()
def test_a_critic_from_a_mean_pooled_model_values_each_prefix_as_the_scorer_does(folders: tuple[str, str], tmp_path: Path) -> None:
    path = mean_pooled(folders, tmp_path / "rm")
    ids = random_sequences((9,))[0]
    prefixes = pad_sequences([ids[: end + 1] for end in range(len(ids))])
    scores_S = sequence_scores(load_reward_model(path), *prefixes) - OFFSET
    critic = ValueModel.from_reward_model(path).eval()
    for pad in (pad_sequences, pad_left):
        ids_BS, attention_BS = pad([random_sequences((12,))[0], ids])
        torch.testing.assert_close(critic(ids_BS, attention_BS)[1][attention_BS[1]], scores_S, atol=1e-5, rtol=0)


def test_a_reward_model_is_trained_further_with_its_own_head(folders: tuple[str, str], tmp_path: Path) -> None:
    again = init_reward_model(folders[1], seed=99)
    assert torch.equal(again.score.weight, load_reward_model(folders[1]).score.weight)
    assert reward_offset(again) == 0.0
    with pytest.raises(ModelError, match=r"trained with pooling = last; set rm\.pooling = last"):
        init_reward_model(folders[1], seed=0, pooling="mean")
    with pytest.raises(ModelError, match="trained with pooling = mean"):
        init_reward_model(mean_pooled(folders, tmp_path / "rm"), seed=0)


def test_an_unknown_pooling_is_refused(folders: tuple[str, str], tmp_path: Path) -> None:
    folder = Path(mean_pooled(folders, tmp_path / "rm"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pooling": "max"}))
    with pytest.raises(ModelError, match="'max'"):
        load_reward_model(str(folder))


def test_a_trunk_with_holes_is_refused(folders: tuple[str, str], tmp_path: Path) -> None:
    model = load_reward_model(folders[1])
    state = {name: tensor for name, tensor in model.state_dict().items() if "norm" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    make_tokenizer().save_pretrained(tmp_path)
    for load in (load_reward_model, lambda path: init_reward_model(path, seed=0)):
        with pytest.raises(ModelError, match=r"no weights for .*norm"):
            load(str(tmp_path))
