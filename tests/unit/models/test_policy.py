"""The policy with a value head: one pass through the trunk, values that padding does not touch, and who gets which gradient."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from app.experience import FinishReason, Prompt, Rollout, TokenBatch
from app.models.heads import ValueHead
from app.models.load import load_causal_lm
from app.models.policy import PolicyModel
from app.models.segments import attend_by_segment
from tests.tiny_models import VOCABULARY, make_llama, make_neox

SHAPES = [(5, 4), (3, 7), (6, 1), (2, 5)]  # prompt and response tokens
SAMPLES = [(20, 4), (3, 7), (20, 9), (20, 1)]  # of one prompt, whose responses begin alike, and another


@pytest.fixture(scope="module", params=[make_neox, make_llama], ids=["neox", "llama"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PolicyModel:
    """float64, with values away from 0."""
    language_model = load_causal_lm(request.param(tmp_path_factory.mktemp("policy"))).double()
    head = ValueHead(64, seed=1).double()
    torch.manual_seed(2)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return PolicyModel(language_model, head)


def batch(shapes: list[tuple[int, int]]) -> TokenBatch:
    rollouts = []
    for prompt, response in shapes:
        ids = np.random.default_rng(prompt).integers(4, VOCABULARY, prompt + response).astype(np.int32)
        nothing = np.zeros(response, np.float32)
        rollouts.append(
            Rollout(Prompt(str(prompt), "", ids[:prompt]), 0, ids[prompt:], nothing, FinishReason.STOP, nothing.astype(np.int32))
        )
    return TokenBatch.from_rollouts(rollouts, pad_id=0)


def outputs(model: PolicyModel, tokens: TokenBatch, **settings: bool) -> Any:
    return model(tokens.ids_BS, tokens.attention_BS, tokens.prompt_lengths_B, tokens.mask_BT, 0.8, **settings)


def test_values_begin_at_zero_and_depend_on_the_seed_alone() -> None:
    head, same, other = ValueHead(8, seed=1), ValueHead(8, seed=1), ValueHead(8, seed=2)
    states = torch.randn(3, 8)
    assert head(states).eq(0).all()
    assert torch.equal(head.inner.weight, same.inner.weight) and not torch.equal(head.inner.weight, other.inner.weight)
    assert head.bfloat16()(states.bfloat16()).dtype == torch.float32
    head(states).sum().backward()
    assert head.outer.weight.grad is not None and head.outer.weight.grad.ne(0).any(), "it could never learn"


@pytest.mark.parametrize("shapes", [SHAPES, SAMPLES], ids=["prompts", "samples"])
def test_values_are_those_of_the_states_before_the_tokens_each_sequence_alone(shapes: list[tuple[int, int]], model: PolicyModel) -> None:
    """Whatever stands beside a sequence, padded or behind each other in one row; 0 where masked."""
    tokens = batch(shapes)
    packed = copy.deepcopy(model)
    assert attend_by_segment(packed.language_model)
    for each in (model, packed):
        values_BT = outputs(each, tokens)[2]
        assert values_BT[~tokens.mask_BT].eq(0).all()
        for row, (prompt, response) in enumerate(shapes):
            ids = tokens.ids_BS[row, : prompt + response]
            hidden_SH = model.language_model.base_model(ids[None]).last_hidden_state[0]
            inner = (hidden_SH @ model.value_head.inner.weight.T + model.value_head.inner.bias).clamp(min=0)
            expected = (inner @ model.value_head.outer.weight.T + model.value_head.outer.bias)[prompt - 1 : -1, 0]
            torch.testing.assert_close(values_BT[row, :response].double(), expected, rtol=1e-5, atol=1e-5)


def test_samples_of_a_prompt_in_one_row_give_the_gradients_of_padded_ones(model: PolicyModel) -> None:
    tokens = batch(SAMPLES)
    packed = copy.deepcopy(model)
    assert attend_by_segment(packed.language_model)
    found = []
    for each in (model, packed):
        logprobs_BT, entropy_BT, values_BT = outputs(each, tokens, entropy_gradient=True)
        loss = (logprobs_BT.pow(2) + 0.1 * entropy_BT + values_BT.pow(3)).sum()
        found.append([logprobs_BT.detach(), *torch.autograd.grad(loss, list(each.parameters()))])
    for padded, alike in zip(*found, strict=True):
        torch.testing.assert_close(alike, padded, rtol=0, atol=1e-6 * max(1.0, float(padded.abs().max())))


def test_the_trunk_runs_once(model: PolicyModel) -> None:
    calls: list[int] = []
    hook = model.language_model.base_model.register_forward_pre_hook(lambda *call: calls.append(1))
    outputs(model, batch(SHAPES))
    hook.remove()
    assert calls == [1]


def test_the_heads_see_response_tokens_alone(model: PolicyModel) -> None:
    """Logits are the largest tensor of all: none are computed for what is padded."""
    seen: list[int] = []
    heads = (model.language_model.get_output_embeddings(), model.value_head)
    hooks = [head.register_forward_hook(lambda module, arguments, output: seen.append(arguments[0][..., 0].numel())) for head in heads]
    outputs(model, batch(SHAPES))
    for hook in hooks:
        hook.remove()
    assert seen == [sum(response for _, response in SHAPES)] * 2


@pytest.mark.parametrize("part", [0, 1], ids=["log-probs", "entropy"])
def test_the_policy_loss_leaves_the_value_head_alone(part: int, model: PolicyModel) -> None:
    loss = outputs(model, batch(SHAPES), entropy_gradient=True)[part].pow(2).sum()
    gradients = torch.autograd.grad(loss, [*model.language_model.parameters(), *model.value_head.parameters()], allow_unused=True)
    head = len(list(model.value_head.parameters()))
    assert all(gradient is None for gradient in gradients[-head:])
    assert any(gradient.ne(0).any() for gradient in gradients[:-head] if gradient is not None)


def test_the_value_loss_reaches_the_trunk_but_not_the_output_head(model: PolicyModel, tmp_path: Path) -> None:
    language_model = model.language_model
    values_BT = outputs(model, batch(SHAPES))[2]
    (first,) = torch.autograd.grad(values_BT.sum(), [language_model.base_model.get_input_embeddings().weight], retain_graph=True)
    assert first.ne(0).any()
    output = language_model.get_output_embeddings().weight
    if output is not language_model.get_input_embeddings().weight:
        assert torch.autograd.grad(values_BT.sum(), [output], allow_unused=True) == (None,)


def test_a_frozen_trunk_changes_no_number_and_no_gradient_of_the_head(model: PolicyModel) -> None:
    tokens = batch(SHAPES)
    free, frozen = outputs(model, tokens), outputs(model, tokens, frozen=True)
    for ours, theirs in zip(frozen, free, strict=True):
        assert torch.equal(ours, theirs)
    assert not frozen[0].requires_grad and not frozen[1].requires_grad
    parameters = list(model.value_head.parameters())
    for ours, theirs in zip(
        *(torch.autograd.grad(x[2].square().sum(), parameters, retain_graph=True) for x in (frozen, free)), strict=True
    ):
        assert torch.equal(ours, theirs)
    trunk = list(model.language_model.parameters())
    assert all(gradient is None for gradient in torch.autograd.grad(frozen[2].sum(), trunk, allow_unused=True))


def test_without_a_value_head_there_are_no_values(model: PolicyModel) -> None:
    assert outputs(PolicyModel(model.language_model), batch(SHAPES))[2] is None
