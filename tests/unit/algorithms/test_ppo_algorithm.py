"""PPO's parts: order of the credit step, lag weights, metrics, and what stops it."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from app.algorithms import ALGORITHMS
from app.algorithms.ppo import Ppo, PpoConfig
from app.errors import NonFiniteError
from app.experience import Experience, Minibatch, PolicyOutputs, TokenBatch, Totals

Make = Callable[..., Any]


def one_row(**changes: torch.Tensor) -> Experience:
    """A prompt of one token and a response of three, of which the log-probs, values and score make easy sums."""
    tokens = TokenBatch(
        ids_BS=torch.tensor([[5, 6, 7, 8]]),
        attention_BS=torch.ones(1, 4, dtype=torch.bool),
        prompt_lengths_B=torch.tensor([1]),
        response_lengths_B=torch.tensor([3]),
        mask_BT=torch.ones(1, 3, dtype=torch.bool),
    )
    experience = Experience(
        tokens=tokens,
        scores_B=torch.tensor([3.0]),
        behaviour_BT=torch.tensor([[-1.0, -2.0, -1.0]]),
        proximal_BT=torch.tensor([[-1.0, -2.0, -1.0]]),
        reference_BT=torch.tensor([[-1.5, -1.0, -3.0]]),
        values_BT=torch.tensor([[1.0, 0.5, 1.5]]),
    )
    return replace(experience, **changes)


def test_credit_table() -> None:
    # kl_coef 0.1: penalties 0.1 * (0.5, -1, 2); rewards -0.05, 0.1, -0.2 + 3 = 2.8. gamma 1, lam 0.9:
    # deltas -0.05 + 0.5 - 1 = -0.55; 0.1 + 1.5 - 0.5 = 1.1; 2.8 + 0 - 1.5 = 1.3
    # advantages 1.3; 1.1 + 0.9 * 1.3 = 2.27; -0.55 + 0.9 * 2.27 = 1.493. Returns: + values = 2.493, 2.77, 2.8
    # whitened: mean 1.687667, variance (0.194667^2 + 0.582333^2 + 0.387667^2) / 3 = 0.175764, root 0.419242
    credited = Ppo(PpoConfig(lam=0.9)).credit(one_row(), kl_coef=0.1)
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(credited.rewards_BT, torch.tensor([[-0.05, 0.1, 2.8]]), **close)
    torch.testing.assert_close(credited.returns_BT, torch.tensor([[2.493, 2.77, 2.8]]), **close)
    torch.testing.assert_close(credited.advantages_BT, torch.tensor([[-0.464330, 1.389013, -0.924684]]), **close)
    plain = Ppo(PpoConfig(lam=0.9, whiten_advantages=False)).credit(one_row(), kl_coef=0.1)
    torch.testing.assert_close(plain.advantages_BT, torch.tensor([[1.493, 2.27, 1.3]]), **close)
    torch.testing.assert_close(plain.returns_BT, credited.returns_BT)


def test_credit_leaves_its_input_alone(experience_of: Make) -> None:
    experience = experience_of(1)
    experience.scores_B[2] = math.nan
    before = {f.name: x.clone() for f in fields(experience) if isinstance(x := getattr(experience, f.name), torch.Tensor)}
    mask_BT = experience.mask_BT.clone()
    Ppo(PpoConfig()).credit(experience, kl_coef=0.1)
    for name, x in before.items():
        torch.testing.assert_close(getattr(experience, name), x, equal_nan=True)
    assert experience.mask_BT.equal(mask_BT)


def test_a_batch_of_failed_scores_moves_nothing(experience_of: Make, models_of: Make) -> None:
    ppo, models = Ppo(PpoConfig()), models_of(2)
    experience = experience_of(2)
    credited = ppo.credit(replace(experience, scores_B=torch.full_like(experience.scores_B, math.nan)), kl_coef=0.1)
    minibatch = Minibatch.from_rows(credited, torch.arange(8))
    loss = ppo.loss(models.outputs(minibatch.tokens), minibatch, Totals(tokens=0, sequences=0), max_lag=1)
    assert set(loss.metrics.values()) == {0.0}
    for gradient in models.gradients(loss):
        assert gradient.eq(0).all()


@pytest.mark.parametrize("name", ["behaviour_BT", "proximal_BT", "reference_BT", "values_BT"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_input_stops_before_it_spreads(experience_of: Make, name: str, bad: float) -> None:
    experience = experience_of(3)
    getattr(experience, name)[4, 0] = bad
    with pytest.raises(NonFiniteError, match=r"\[4\]"):
        Ppo(PpoConfig()).credit(experience, kl_coef=0.1)
    experience.scores_B[4] = math.nan  # in a failed row it does not matter
    assert Ppo(PpoConfig()).credit(experience, kl_coef=0.1).advantages_BT.isfinite().all()


def test_infinite_score_stops(experience_of: Make) -> None:
    experience = experience_of(3)
    experience.scores_B[1] = math.inf
    with pytest.raises(NonFiniteError, match=r"scores of rollouts \[1\]"):
        Ppo(PpoConfig()).credit(experience, kl_coef=0.1)


def test_lag_weights_the_policy_loss_only_where_asked(experience_of: Make, models_of: Make, step_of: Make) -> None:
    ppo, models = Ppo(PpoConfig()), models_of(4)
    credited = ppo.credit(experience_of(4), kl_coef=0.1)
    rows = [range(8)]
    fresh = replace(credited, behaviour_BT=credited.proximal_BT)
    assert step_of(ppo, models, credited, rows, max_lag=0).policy == step_of(ppo, models, fresh, rows, max_lag=0).policy
    lagging = step_of(ppo, models, credited, rows, max_lag=1)
    assert lagging.policy != step_of(ppo, models, credited, rows).policy
    torch.testing.assert_close(step_of(ppo, models, fresh, rows, max_lag=1).policy, step_of(ppo, models, fresh, rows).policy)
    assert lagging.value == step_of(ppo, models, credited, rows).value
    weights_BT = (credited.proximal_BT - credited.behaviour_BT).exp().clamp(max=2.0)
    assert lagging.metrics["importance_mean"] == pytest.approx(weights_BT[credited.mask_BT].mean().item(), rel=1e-5)


def test_lag_weight_is_cut_at_max_importance() -> None:
    """Behaviour far below proximal: at ratio 1 each token's loss is -A * max_importance, and so is its gradient."""
    ppo = Ppo(PpoConfig(max_importance=1.5, whiten_advantages=False))
    credited = ppo.credit(one_row(behaviour_BT=torch.full((1, 3), -9.0)), kl_coef=0.1)
    minibatch = Minibatch.from_rows(credited, torch.tensor([0]))
    logprobs_BT = credited.proximal_BT.clone().requires_grad_()
    loss = ppo.loss(PolicyOutputs(logprobs_BT, None, torch.zeros(1, 3)), minibatch, Totals(tokens=3, sequences=1), max_lag=1)
    loss.policy.backward()
    torch.testing.assert_close(loss.policy.detach(), -1.5 * credited.advantages_BT.mean())
    torch.testing.assert_close(logprobs_BT.grad, -1.5 * credited.advantages_BT / 3)


def test_metrics_table() -> None:
    # Ratios 1.5, 1, 0.5 with advantages 1, 1, -1 and clip 0.2: losses -1.2, -1, 0.8 (tokens 0 and 2 clipped).
    # approx_kl: (0.5 - log 1.5) + 0 + (-0.5 + log 2) = log(4 / 3) = 0.287682. Values 2, 0.6, 1.5 against old 1, 0.5, 1.5
    # and returns 3, 0.5, 2.5, value_clip 0.2: squares 1 (clipped 1.8^2 = 3.24), 0.01, 1. Means over 3 tokens, values halved.
    ppo = Ppo(PpoConfig(value_coef=0.1))
    minibatch = Minibatch.from_rows(ppo.credit(one_row(), kl_coef=0.1), torch.tensor([0]))
    minibatch = replace(minibatch, advantages_BT=torch.tensor([[1.0, 1.0, -1.0]]), returns_BT=torch.tensor([[3.0, 0.5, 2.5]]))
    outputs = PolicyOutputs(
        logprobs_BT=minibatch.proximal_BT + torch.tensor([[1.5, 1.0, 0.5]]).log(),
        values_BT=torch.tensor([[2.0, 0.6, 1.5]]),
        entropy_BT=torch.tensor([[1.0, 2.0, 4.5]]),
    )
    loss = ppo.loss(outputs, minibatch, Totals(tokens=3, sequences=1), max_lag=0)
    expected = {
        "policy_loss": -1.4 / 3,
        "clip_fraction": 2 / 3,
        "approx_kl": math.log(4 / 3) / 3,
        "ratio_mean": 1.0,
        "entropy": 2.5,
        "value_loss": 4.25 / 6,
        "value_clip_fraction": 1 / 3,
    }
    assert loss.metrics == pytest.approx(expected, rel=1e-5)
    assert loss.policy.item() == pytest.approx(-1.4 / 3, rel=1e-5)
    assert loss.value is not None
    assert loss.value.item() == pytest.approx(0.1 * 4.25 / 6, rel=1e-5)


def test_without_a_critic_there_is_no_value_loss(experience_of: Make, models_of: Make) -> None:
    ppo = Ppo(PpoConfig())
    minibatch = Minibatch.from_rows(ppo.credit(experience_of(7), kl_coef=0.1), torch.arange(8))
    outputs = replace(models_of(7).outputs(minibatch.tokens), values_BT=None)
    loss = ppo.loss(outputs, minibatch, Totals(tokens=10, sequences=8), max_lag=0)
    assert loss.value is None
    assert not any(name.startswith("value") for name in loss.metrics)


def test_every_algorithm_travels_to_workers() -> None:
    for name, algorithm in ALGORITHMS.items():
        instance = algorithm(PpoConfig(lam=0.9))
        assert pickle.loads(pickle.dumps(instance)) == instance, name
