"""Residual dropout: where it is, how much, when, and that nothing of it stays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedModel

from app.config.shared import AdapterConfig
from app.config.training import RewardModelConfig, SftConfig
from app.errors import ModelError
from app.models.load import load_causal_lm
from app.models.residual_dropout import add_residual_dropout, layer_probabilities
from app.models.trainable import choose_trainable, decoder_layers, merged_state
from app.tasks.reward_model import RewardModelTask
from app.tasks.sft import SftTask
from tests.tiny_models import VOCABULARY, make_llama, make_neox

IDS_BS = torch.from_numpy(np.random.default_rng(0).integers(4, VOCABULARY, (2, 12)))


def make_serial_neox(folder: Path) -> str:
    """A GPT-NeoX whose MLP reads what attention has added; `make_neox` has both in parallel."""
    config = GPTNeoXConfig.from_pretrained(make_neox(folder))
    config.use_parallel_residual = False
    torch.manual_seed(0)
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(params=[make_neox, make_serial_neox, make_llama], ids=["neox", "serial-neox", "llama"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(request.param(tmp_path / "model"))


def added(model: PreTrainedModel, *, seed: int = 0) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits, and what each attention and each MLP hands to its layer, as seen by a hook after all others."""
    seen: list[torch.Tensor] = []
    parts = [
        part for layer in decoder_layers(model, "") for name, part in layer.named_children() if name in ("attention", "self_attn", "mlp")
    ]
    hooks = [part.register_forward_hook(lambda *call: seen.append(call[2][0] if isinstance(call[2], tuple) else call[2])) for part in parts]
    torch.manual_seed(seed)
    with torch.no_grad():
        logits = model(IDS_BS).logits
    for hook in hooks:
        hook.remove()
    return logits, seen


def test_probabilities() -> None:
    assert layer_probabilities(0.2, 3, lima=False) == [0.2, 0.2, 0.2]
    assert layer_probabilities(0.3, 4, lima=True) == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert layer_probabilities(0.3, 1, lima=True) == [0.0]


@pytest.mark.parametrize("lima", [False, True])
def test_each_layer_drops_its_share_and_scales_the_rest(folder: str, lima: bool) -> None:
    model = load_causal_lm(folder).train()
    _, whole = added(model)
    add_residual_dropout(model, 0.5, lima=lima)
    _, dropped = added(model)
    assert len(whole) == len(dropped) == 4
    for part, expected in enumerate([0.0, 0.0, 0.5, 0.5] if lima else [0.5] * 4):
        share = (dropped[part] == 0).float().mean().item()
        assert share == pytest.approx(expected, abs=0.05)
    first = 2 if lima else 0  # nothing before it has dropped anything, so its input is the same
    kept = dropped[first] != 0
    torch.testing.assert_close(dropped[first][kept], 2 * whole[first][kept])
    if lima:
        assert torch.equal(dropped[0], whole[0])


def test_the_expectation_is_what_the_model_computes_without(folder: str) -> None:
    model = load_causal_lm(folder).train()
    _, whole = added(model)
    add_residual_dropout(model, 0.25)
    draws = torch.stack([added(model, seed=seed)[1][0] for seed in range(400)])
    error = (draws.mean(0) - whole[0]).abs().max() / whole[0].abs().max()
    assert error < 0.2
    assert (draws.mean() - whole[0].mean()).abs() < 0.01 * whole[0].abs().mean()


def test_it_follows_the_mode_and_torchs_seed(folder: str) -> None:
    model = load_causal_lm(folder)
    plain, _ = added(model)
    add_residual_dropout(model, 0.5)
    assert torch.equal(added(model)[0], plain), "evaluation mode, in which models are loaded"
    model.train()
    first = added(model, seed=1)[0]
    assert not torch.equal(first, plain)
    assert torch.equal(added(model, seed=1)[0], first)
    assert not torch.equal(added(model, seed=2)[0], first)
    assert torch.equal(added(model.eval())[0], plain)


def test_zero_is_no_dropout_at_all(folder: str) -> None:
    model = load_causal_lm(folder).train()
    plain, _ = added(model)
    add_residual_dropout(model, 0.0, lima=True)
    assert torch.equal(added(model)[0], plain)


def test_recomputed_activations_drop_the_same_elements(folder: str) -> None:
    def gradients(*, checkpointing: bool) -> list[torch.Tensor]:
        model = load_causal_lm(folder)
        add_residual_dropout(model, 0.5)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(3)
        model.train()(IDS_BS, use_cache=False).logits.square().mean().backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    torch.testing.assert_close(gradients(checkpointing=True), gradients(checkpointing=False))


def test_the_saved_model_knows_nothing_of_it(folder: str, tmp_path: Path) -> None:
    model = load_causal_lm(folder)
    plain, _ = added(model)
    choose_trainable(model, SftConfig(lora=AdapterConfig(rank=2)), seed=0)
    add_residual_dropout(model.train(), 0.5)
    model.save_pretrained(tmp_path / "saved", state_dict=merged_state(model))
    before, after = load_causal_lm(folder).state_dict(), load_causal_lm(tmp_path / "saved").train()
    assert before.keys() == after.state_dict().keys()
    assert torch.equal(added(after)[0], plain)


def test_both_tasks_train_with_it(folder: str, tmp_path: Path) -> None:
    keys = {"residual_dropout": 0.5, "residual_dropout_lima": True}
    sft = SftTask(tmp_path, folder, "fp32", False, SftConfig(**keys)).build_model()
    rm = RewardModelTask(tmp_path, folder, 0, False, RewardModelConfig(**keys)).build_model()
    for model in (sft.train().language_model, rm.train().reward_model):
        assert [len(layer.mlp._forward_hooks) for layer in decoder_layers(model, "")] == [0, 1]


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (BloomForCausalLM(BloomConfig(vocab_size=32, hidden_size=16, n_layer=1, n_head=2)), "adds the residual stream inside"),
        (
            OPTForCausalLM(OPTConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16)),
            "OPTDecoderLayer has no part called mlp",
        ),
    ],
    ids=["bloom", "opt"],
)
def test_models_that_it_would_spoil_are_refused(model: PreTrainedModel, reason: str) -> None:
    with pytest.raises(ModelError, match=f"{reason}.*residual_dropout = 0"):
        add_residual_dropout(model, 0.1)
