"""Reward models from encoders, which score by their own classification head."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from app.config.shared import ModelConfig
from app.config.training import RewardModelConfig
from app.data.templates import OASST_TOKENS, build_template
from app.data.token_cache import GroupRow
from app.errors import ModelError
from app.models.forward import pad_sequences
from app.models.heads import ValueModel, convert_reward_model, init_reward_model, load_reward_model, save_reward_model, sequence_scores
from app.models.load import is_encoder, resolve_model, writes_text
from app.models.trainable import choose_trainable
from app.tasks.reward_model import RewardModelTask
from tests.tiny_models import PAD, VOCABULARY, make_bert, make_electra, make_neox, make_tokenizer


@pytest.fixture(scope="module", params=[make_bert, make_electra], ids=["bert", "electra"])
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(request.param(tmp_path_factory.mktemp("models") / "encoder"))


@pytest.fixture(scope="module")
def reward_model(encoder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "rm"
    save_reward_model(init_reward_model(encoder, seed=1), make_tokenizer(), folder, 0.25)
    return str(folder)


def sequences(lengths: tuple[int, ...] = (7, 3, 12, 2)) -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    return [draw.integers(4, VOCABULARY, length).astype(np.int32) for length in lengths]


@torch.no_grad()
def test_scores_are_those_of_each_sequence_alone_in_plain_transformers(reward_model: str) -> None:
    plain = AutoModelForSequenceClassification.from_pretrained(reward_model).eval()
    alone = torch.cat([plain(torch.from_numpy(ids.astype(np.int64))[None]).logits[0] for ids in sequences()])
    assert alone.std() > 0.01
    model = load_reward_model(reward_model)
    right = pad_sequences(sequences())
    left = tuple(part.flip(1) for part in pad_sequences([ids[::-1].copy() for ids in sequences()]))
    for ids_BS, attention_BS in (right, left):
        for token in (0, 9):
            scores = sequence_scores(model, ids_BS.masked_fill(~attention_BS, token), attention_BS)
            assert scores.dtype == torch.float32
            torch.testing.assert_close(scores, alone, atol=1e-5, rtol=0)


def test_the_head_is_drawn_by_seed_and_the_trunk_is_the_encoders(encoder: str) -> None:
    first, again, other = (init_reward_model(encoder, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    changed = {name for name in first if not torch.equal(first[name], other[name])}
    assert changed
    assert all("classifier" in name or "pooler" in name for name in changed)


def test_dropout_is_off_even_in_training_mode(encoder: str) -> None:
    model = init_reward_model(encoder, seed=1)
    expected = sequence_scores(model, *pad_sequences(sequences()))
    torch.testing.assert_close(sequence_scores(model.train(), *pad_sequences(sequences())), expected)


def test_it_learns_a_ranking_and_keeps_it_on_disk(encoder: str, tmp_path: Path) -> None:
    config = RewardModelConfig(loss="pairs")
    task = RewardModelTask(tmp_path, encoder, 0, False, config)
    model, cpu = task.build_model(), torch.device("cpu")
    rows = [GroupRow(str(n), tuple(sequences((8, 8, 8))[k] + n % 3 for k in range(3))) for n in range(4)]

    def metrics() -> dict[str, float]:
        with torch.no_grad():
            return task.summarise(Counter(task.evaluate(model, rows, cpu)))

    before = metrics()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        (task.loss(model, rows, cpu) / sum(map(task.weight, rows))).backward()
        optimizer.step()
    assert metrics()["loss"] < 0.5 * before["loss"]
    assert metrics()["pair_accuracy"] == 1.0
    task.export(model, tmp_path / "rm")
    with torch.no_grad():
        ids_BS, attention_BS = pad_sequences(sequences())
        expected = model(ids_BS, attention_BS)
        torch.testing.assert_close(sequence_scores(load_reward_model(str(tmp_path / "rm")), *pad_sequences(sequences())), expected)


@pytest.mark.parametrize("settings", [{"freeze_layers": 1}, {"lora": {"rank": 2}}], ids=["frozen", "lora"])
def test_parts_of_an_encoder_can_be_trained(encoder: str, settings: dict[str, object], tmp_path: Path) -> None:
    model = init_reward_model(encoder, seed=1)
    choose_trainable(model, RewardModelConfig.model_validate(settings), seed=0)
    sequence_scores(model, *pad_sequences(sequences())).sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert any("classifier" in name for name in trained)
    assert not any("layer.0" in name and "lora" not in name for name in trained)
    save_reward_model(model, make_tokenizer(), tmp_path, 0.0)
    with torch.no_grad():
        expected = sequence_scores(model, *pad_sequences(sequences()))
        torch.testing.assert_close(sequence_scores(load_reward_model(str(tmp_path)), *pad_sequences(sequences())), expected)


def test_what_an_encoder_cannot_do(encoder: str, reward_model: str) -> None:
    with pytest.raises(ModelError, match=r"no critic can start from it"):
        ValueModel.from_reward_model(reward_model)
    with pytest.raises(ModelError, match=r"set rm\.pooling = last"):
        init_reward_model(encoder, seed=0, pooling="mean")
    assert is_encoder(encoder)
    assert not writes_text(encoder)
    assert not writes_text(reward_model)


def test_a_decoder_writes_text_until_it_is_a_reward_model(tmp_path: Path) -> None:
    causal_lm = make_neox(tmp_path / "sft")
    assert writes_text(causal_lm)
    assert not is_encoder(causal_lm)
    save_reward_model(init_reward_model(causal_lm, seed=0), make_tokenizer(), tmp_path / "rm", 0.0)
    assert not writes_text(tmp_path / "rm")


def bare_encoder(folder: Path, source: str) -> Path:
    """Without chat template, role tokens and end token, as encoders are published."""
    AutoModelForSequenceClassification.from_pretrained(source).base_model.save_pretrained(folder)
    backend = make_tokenizer().backend_tokenizer
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=PAD, sep_token="<|endoftext|>").save_pretrained(folder)
    return folder


def test_a_published_encoder_is_completed_for_training(encoder: str, tmp_path: Path) -> None:
    source = bare_encoder(tmp_path / "bare", encoder)
    path = resolve_model(ModelConfig(path=str(source)), texts=[], seed=1, folder=tmp_path / "run", for_oasst=False)
    tokenizer = AutoTokenizer.from_pretrained(path)
    template = build_template("auto", tokenizer)
    assert template.name == "oasst"
    assert template.eos_id == tokenizer.sep_token_id
    assert set(OASST_TOKENS) <= tokenizer.get_vocab().keys()
    model = init_reward_model(path, seed=0)
    assert model.get_input_embeddings().num_embeddings >= len(tokenizer)
    original = AutoModelForSequenceClassification.from_pretrained(encoder).base_model.state_dict()
    kept = model.base_model.state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in original.items() if "pooler" not in name and "word" not in name)


@torch.no_grad()
def test_a_reward_model_without_template_is_completed_with_its_head(reward_model: str, tmp_path: Path) -> None:
    source = bare_encoder(tmp_path / "bare", reward_model)
    load_reward_model(reward_model).save_pretrained(source)
    path = resolve_model(ModelConfig(path=str(source)), texts=[], seed=1, folder=tmp_path / "run", for_oasst=False)
    scores, expected = (sequence_scores(load_reward_model(folder), *pad_sequences(sequences())) for folder in (path, reward_model))
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_conversion_keeps_scores(reward_model: str, tmp_path: Path) -> None:
    convert_reward_model(reward_model, tmp_path / "copy")
    assert json.loads((tmp_path / "copy" / "config.json").read_text())["reward_offset"] == 0.25
    before, after = (
        sequence_scores(load_reward_model(path), *pad_sequences(sequences())) for path in (reward_model, str(tmp_path / "copy"))
    )
    torch.testing.assert_close(after, before, atol=0, rtol=0)
