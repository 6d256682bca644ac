"""Frozen layers and adapters: what is trained, and what is saved."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, PretrainedConfig, PreTrainedModel

from app.config.shared import AdapterConfig
from app.config.training import SftConfig
from app.data.collate import SftBatch, collate_threads
from app.data.token_cache import SftRow
from app.errors import ModelError
from app.models import trainable
from app.models.heads import init_reward_model, load_reward_model, save_reward_model, sequence_scores
from app.models.load import load_causal_lm, load_tokenizer
from app.models.trainable import check_trainable, choose_trainable, merged_state
from app.tasks.sft import TargetLoss
from tests.tiny_models import VOCABULARY, make_llama, make_neox

LORA = AdapterConfig(rank=4, alpha=8)


@pytest.fixture(params=[make_neox, make_llama], ids=["neox", "llama"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(request.param(tmp_path / "model"))


@pytest.fixture
def batch() -> SftBatch:
    generator = np.random.default_rng(0)
    return collate_threads([SftRow(generator.integers(4, VOCABULARY, n).astype(np.int32), np.ones(n, np.bool_)) for n in (9, 14)])


def train(model: PreTrainedModel, batch: SftBatch, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        TargetLoss(model)(*batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.set_attn_implementation("sdpa")  # as it was before it was put into TargetLoss


def changed(before: dict[str, torch.Tensor], model: PreTrainedModel) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def test_frozen_layers_and_embeddings_stay_and_the_rest_learns(folder: str, batch: SftBatch) -> None:
    model = load_causal_lm(folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    choose_trainable(model, SftConfig(freeze_layers=1), seed=0)
    train(model, batch)
    learnt = changed(before, model)
    assert any("layers.1." in name for name in learnt)
    assert not any("layers.0." in name or "embed_tokens" in name or "embed_in" in name for name in learnt)


def test_freezing_everything_is_refused(folder: str) -> None:
    with pytest.raises(ModelError, match="freeze_layers = 2 leaves nothing"):
        choose_trainable(load_causal_lm(folder), SftConfig(freeze_layers=2), seed=0)


@pytest.mark.parametrize("embeddings", [True, False])
@torch.no_grad()
def test_the_saved_model_computes_what_the_adapted_one_does(folder: str, batch: SftBatch, tmp_path: Path, embeddings: bool) -> None:
    model = load_causal_lm(folder)
    plain = model(batch.ids_BS).logits
    choose_trainable(model, SftConfig(lora=LORA.model_copy(update={"embeddings": embeddings})), seed=0)
    torch.testing.assert_close(model(batch.ids_BS).logits, plain)  # new adapters add nothing
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any(".lora_" in name for name in trainable)
    assert any(".lora_" not in name for name in trainable) == embeddings
    with torch.enable_grad():
        train(model, batch)
    adapted = model(batch.ids_BS).logits
    assert (adapted - plain).abs().max() > 1e-2
    model.save_pretrained(tmp_path / "merged", state_dict=merged_state(model))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    torch.testing.assert_close(saved(batch.ids_BS).logits, adapted, atol=1e-4, rtol=0)
    torch.testing.assert_close(model(batch.ids_BS).logits, adapted)  # saving leaves the adapters as they are


@torch.no_grad()
def test_a_reward_model_with_adapters_is_saved_merged(folder: str, batch: SftBatch, tmp_path: Path) -> None:
    model = init_reward_model(folder, seed=0)
    choose_trainable(model, SftConfig(lora=LORA), seed=0)
    assert model.score.weight.requires_grad
    for name, parameter in model.named_parameters():
        if ".lora_B" in name:
            parameter.normal_()
    attention_BS = torch.ones_like(batch.ids_BS, dtype=torch.bool)
    scores = sequence_scores(model, batch.ids_BS, attention_BS)
    save_reward_model(model, load_tokenizer(folder), tmp_path / "rm", reward_offset=0.0)
    torch.testing.assert_close(
        sequence_scores(load_reward_model(str(tmp_path / "rm")), batch.ids_BS, attention_BS), scores, atol=1e-4, rtol=0
    )


def test_an_unknown_target_names_the_layers_there_are(folder: str) -> None:
    """Also beside known ones: its layers would go untrained without a word."""
    name = "dense" if "neox" in load_causal_lm(folder).config.model_type else "q_proj"
    for targets in (("nothing",), (name, "nothing")):
        with pytest.raises(ModelError, match=rf"lora.targets: no linear layer is called nothing; there are .*{name}.*: name some of these"):
            choose_trainable(load_causal_lm(folder), SftConfig(lora=AdapterConfig(targets=targets)), seed=0)


def test_a_model_without_linear_layers_takes_no_adapters(tmp_path: Path) -> None:
    GPT2Config(n_layer=2, n_embd=32, n_head=2).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"lora: GPT2Model has no linear layers to put adapters beside: leave lora out"):
        check_trainable(str(tmp_path), SftConfig(lora=AdapterConfig()))


def test_a_released_reward_model_is_seen_as_the_trunk_that_is_trained(tmp_path: Path) -> None:
    config = json.loads((Path(make_neox(tmp_path / "neox")) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "gpt_neox_reward_model", "architectures": []}))
    check_trainable(str(tmp_path), SftConfig(freeze_layers=1))
    with pytest.raises(ModelError, match="freeze_layers = 2 leaves nothing of the 2 layers of GPTNeoXModel"):
        check_trainable(str(tmp_path), SftConfig(freeze_layers=2))


def test_adapters_and_freezing_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="exclude each other"):
        SftConfig(freeze_layers=1, lora=LORA)


def test_a_model_of_its_own_code_without_a_bare_trunk_is_looked_at_when_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    own = PretrainedConfig(auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})
    monkeypatch.setattr(trainable, "_sizes", lambda path, trust_remote_code: own)
    check_trainable("own", SftConfig(freeze_layers=1), trust_remote_code=True)
