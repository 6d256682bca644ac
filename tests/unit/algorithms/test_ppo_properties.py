"""What PPO's results may not depend on: padding, micro-batches, ranks, row order; and where its gradient must be zero."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.algorithms.ppo import Ppo, PpoConfig
from app.experience import Experience, Loss, Minibatch, Totals

LAMBDAS = [0.9, 0.95, 1.0]
CLOSE = {"rtol": 1e-9, "atol": 1e-10}  # everything here is float64
seeds = st.integers(0, 10_000)
properties = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
Make = Callable[..., Any]


def credited_fields(experience: Experience) -> dict[str, torch.Tensor]:
    fields = {"rewards": experience.rewards_BT, "advantages": experience.advantages_BT, "returns": experience.returns_BT}
    return {name: x for name, x in fields.items() if x is not None}


def assert_same_step(actual: Loss, expected: Loss, models: Any) -> None:
    assert actual.metrics.keys() == expected.metrics.keys()
    for name in expected.metrics:
        assert actual.metrics[name] == pytest.approx(expected.metrics[name], rel=1e-5, abs=1e-6), name
    torch.testing.assert_close(actual.policy, expected.policy, **CLOSE)
    torch.testing.assert_close(actual.value, expected.value, **CLOSE)
    for ours, theirs in zip(models.gradients(actual), models.gradients(expected), strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("lam", LAMBDAS)
@given(seed=seeds, padding=st.integers(1, 6))
@properties
def test_padding(experience_of: Make, models_of: Make, step_of: Make, lam: float, seed: int, padding: int) -> None:
    ppo, models = Ppo(PpoConfig(lam=lam)), models_of(seed)
    tight = ppo.credit(experience_of(seed), kl_coef=0.1)
    wide = ppo.credit(experience_of(seed, padding=padding), kl_coef=0.1)
    length = tight.mask_BT.shape[1]
    for name, x_BT in credited_fields(wide).items():
        torch.testing.assert_close(x_BT[:, :length], credited_fields(tight)[name], **CLOSE)
        assert x_BT[:, length:].eq(0).all()
    rows = [range(8)]
    assert_same_step(step_of(ppo, models, wide, rows), step_of(ppo, models, tight, rows), models)
    # `Minibatch.from_rows` cuts padding off, so the loss is also given the wide tensors as they are.
    everything = Minibatch(
        wide.tokens, wide.behaviour_BT, wide.proximal_BT, wide.reference_BT, wide.values_BT, wide.advantages_BT, wide.returns_BT
    )
    totals = Totals(tokens=int(wide.mask_BT.sum()), sequences=8)
    uncut = ppo.loss(models.outputs(wide.tokens), everything, totals, max_lag=1)
    assert_same_step(uncut, step_of(ppo, models, tight, rows, max_lag=1), models)


@pytest.mark.parametrize("lam", LAMBDAS)
@given(seed=seeds, micro_batch=st.sampled_from([1, 2, 3, 4]), max_lag=st.sampled_from([0, 1]))
@properties
def test_micro_batches(experience_of: Make, models_of: Make, step_of: Make, lam: float, seed: int, micro_batch: int, max_lag: int) -> None:
    ppo, models = Ppo(PpoConfig(lam=lam)), models_of(seed)
    credited = ppo.credit(experience_of(seed), kl_coef=0.1)
    parts = [range(start, min(start + micro_batch, 8)) for start in range(0, 8, micro_batch)]
    split = step_of(ppo, models, credited, parts, max_lag=max_lag)
    assert_same_step(split, step_of(ppo, models, credited, [range(8)], max_lag=max_lag), models)


@pytest.mark.parametrize("lam", LAMBDAS)
@given(seed=seeds, ranks=st.sampled_from([2, 4]), micro_batch=st.sampled_from([1, 2]))
@properties
def test_ranks(experience_of: Make, models_of: Make, step_of: Make, lam: float, seed: int, ranks: int, micro_batch: int) -> None:
    """Rows dealt out to ranks, each splitting its own into micro-batches; gradients are summed over ranks."""
    ppo, models = Ppo(PpoConfig(lam=lam)), models_of(seed)
    credited = ppo.credit(experience_of(seed), kl_coef=0.1)
    hands = [list(range(rank, 8, ranks)) for rank in range(ranks)]
    parts = [hand[start : start + micro_batch] for hand in hands for start in range(0, len(hand), micro_batch)]
    assert_same_step(step_of(ppo, models, credited, parts), step_of(ppo, models, credited, [range(8)]), models)


@pytest.mark.parametrize("lam", LAMBDAS)
@given(seed=seeds, order=st.permutations(range(8)))
@properties
def test_row_order(experience_of: Make, models_of: Make, step_of: Make, lam: float, seed: int, order: list[int]) -> None:
    ppo, models = Ppo(PpoConfig(lam=lam)), models_of(seed)
    experience, index = experience_of(seed), torch.tensor(order)
    shuffled = replace(
        experience,
        tokens=experience.tokens.rows(index),
        **{name: getattr(experience, name)[index] for name in ("scores_B", "behaviour_BT", "proximal_BT", "reference_BT", "values_BT")},
    )
    straight, turned = ppo.credit(experience, kl_coef=0.1), ppo.credit(shuffled, kl_coef=0.1)
    for name, x_BT in credited_fields(turned).items():
        torch.testing.assert_close(x_BT, credited_fields(straight)[name][index], **CLOSE)
    assert_same_step(step_of(ppo, models, turned, [range(8)]), step_of(ppo, models, straight, [range(8)]), models)


@pytest.mark.parametrize("lam", LAMBDAS)
@pytest.mark.parametrize("max_lag", [0, 1])
def test_no_derivative_at_masked_positions(experience_of: Make, models_of: Make, lam: float, max_lag: int) -> None:
    """The outputs are filled with numbers where masked: none of them may matter, and every unmasked one must."""
    ppo = Ppo(PpoConfig(lam=lam, value_clip=None, clip=0.99))
    credited = ppo.credit(experience_of(5), kl_coef=0.1)
    minibatch = Minibatch.from_rows(credited, torch.arange(8))
    mask_BT = minibatch.mask_BT
    with torch.no_grad():
        outputs = models_of(5).outputs(minibatch.tokens)
    noise_BT = torch.where(mask_BT, 0.0, 3.0)
    logprobs_BT, values_BT = (outputs.logprobs_BT + noise_BT).requires_grad_(), (outputs.values_BT + noise_BT).requires_grad_()
    filled = replace(outputs, logprobs_BT=logprobs_BT, values_BT=values_BT, entropy_BT=outputs.entropy_BT + noise_BT)
    totals = Totals(tokens=int(mask_BT.sum()), sequences=8)
    loss = ppo.loss(filled, minibatch, totals, max_lag=max_lag)
    clean = ppo.loss(outputs, minibatch, totals, max_lag=max_lag)
    assert loss.metrics == pytest.approx(dict(clean.metrics))
    (loss.policy + loss.value).backward()
    for gradient_BT in (logprobs_BT.grad, values_BT.grad):
        assert gradient_BT is not None
        assert gradient_BT[~mask_BT].eq(0).all()
        assert gradient_BT[mask_BT].ne(0).float().mean() > 0.9


@pytest.mark.parametrize("lam", LAMBDAS)
@pytest.mark.parametrize("max_lag", [0, 1])
def test_zero_advantage_gives_zero_policy_gradient(experience_of: Make, models_of: Make, step_of: Make, lam: float, max_lag: int) -> None:
    ppo, models = Ppo(PpoConfig(lam=lam)), models_of(6)
    credited = ppo.credit(experience_of(6), kl_coef=0.1)
    flat = replace(credited, advantages_BT=torch.zeros_like(credited.advantages_BT))
    for experience, expected_zero in [(flat, True), (credited, False)]:
        policy_gradient, critic_gradient = models.gradients(step_of(ppo, models, experience, [range(8)], max_lag=max_lag))
        assert bool(policy_gradient.eq(0).all()) is expected_zero
        assert critic_gradient.ne(0).any()


@pytest.mark.parametrize("lam", LAMBDAS)
@given(seed=seeds)
@properties
def test_first_step(experience_of: Make, proximal_models_of: Make, step_of: Make, lam: float, seed: int) -> None:
    """Before any update every ratio is 1, and the policy gradient is that of -sum A log p / tokens."""
    ppo, models = Ppo(PpoConfig(lam=lam)), proximal_models_of(seed)
    credited = ppo.credit(experience_of(seed), kl_coef=0.1)
    loss = step_of(ppo, models, credited, [range(8)])
    assert loss.metrics["ratio_mean"] == pytest.approx(1, abs=1e-6)
    assert loss.metrics["approx_kl"] == pytest.approx(0, abs=1e-12)
    assert loss.metrics["clip_fraction"] == loss.metrics["value_clip_fraction"] == 0
    policy_gradient, _ = models.gradients(loss)
    objective = -(credited.advantages_BT * models.outputs(credited.tokens).logprobs_BT).sum() / credited.mask_BT.sum()
    torch.testing.assert_close(policy_gradient, torch.autograd.grad(objective, models.policy_VV)[0], **CLOSE)


@pytest.mark.parametrize("lam", LAMBDAS)
@given(seed=seeds, failed=st.sets(st.integers(0, 7), min_size=1, max_size=6))
@properties
def test_failed_rows_count_nowhere(experience_of: Make, models_of: Make, step_of: Make, lam: float, seed: int, failed: set[int]) -> None:
    """A batch with failed scores trains exactly as the batch without those rows."""
    ppo, models = Ppo(PpoConfig(lam=lam)), models_of(seed)
    experience = experience_of(seed)
    scores_B = experience.scores_B.clone()
    scores_B[list(failed)] = math.nan
    kept = sorted(set(range(8)) - failed)
    index = torch.tensor(kept)
    tokens = experience.tokens.rows(index)
    length = tokens.mask_BT.shape[1]
    smaller = Experience(
        tokens,
        experience.scores_B[index],
        experience.behaviour_BT[index, :length],
        experience.proximal_BT[index, :length],
        experience.reference_BT[index, :length],
        experience.values_BT[index, :length],
    )
    masked, alone = ppo.credit(replace(experience, scores_B=scores_B), kl_coef=0.1), ppo.credit(smaller, kl_coef=0.1)
    assert not masked.mask_BT[list(failed)].any()
    for name, x_BT in credited_fields(masked).items():
        torch.testing.assert_close(x_BT[index, :length], credited_fields(alone)[name], **CLOSE)
        assert x_BT[list(failed)].eq(0).all()
    assert_same_step(step_of(ppo, models, masked, [range(8)]), step_of(ppo, models, alone, [range(len(kept))]), models)
