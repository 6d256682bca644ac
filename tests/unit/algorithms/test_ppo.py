"""PPO's parts: the credit step by hand, the value loss, metrics, and what stops it."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
import torch

from app.algorithms.ppo import Ppo, PpoOptions
from app.errors import NonFiniteError
from app.experience import Minibatch, PolicyOutputs, Totals
from tests.bigram_models import Models, one_row, sample_experience, sum_of_losses

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def test_credit_table() -> None:
    # kl_coef 0.1: penalties 0.1 * (0.5, -1, 2); rewards -0.05, 0.1, -0.2 + 3 = 2.8. gamma 1, lam 0.9:
    # deltas -0.05 + 0.5 - 1 = -0.55; 0.1 + 1.5 - 0.5 = 1.1; 2.8 + 0 - 1.5 = 1.3
    # advantages 1.3; 1.1 + 0.9 * 1.3 = 2.27; -0.55 + 0.9 * 2.27 = 1.493. Returns: + values = 2.493, 2.77, 2.8
    # whitened: mean 1.687667, variance (0.194667^2 + 0.582333^2 + 0.387667^2) / 3 = 0.175764, root 0.419242
    credited = Ppo(PpoOptions(lam=0.9)).credit(one_row(), kl_coef=0.1)
    torch.testing.assert_close(credited.rewards_BT, torch.tensor([[-0.05, 0.1, 2.8]]), **CLOSE)
    torch.testing.assert_close(credited.returns_BT, torch.tensor([[2.493, 2.77, 2.8]]), **CLOSE)
    torch.testing.assert_close(credited.advantages_BT, torch.tensor([[-0.464330, 1.389013, -0.924684]]), **CLOSE)
    plain = Ppo(PpoOptions(lam=0.9, whiten_advantages=False)).credit(one_row(), kl_coef=0.1)
    torch.testing.assert_close(plain.advantages_BT, torch.tensor([[1.493, 2.27, 1.3]]), **CLOSE)
    torch.testing.assert_close(plain.returns_BT, credited.returns_BT)


def test_credit_leaves_its_input_alone() -> None:
    experience = sample_experience(1)
    experience.scores_B[2] = math.nan
    before = {f.name: x.clone() for f in fields(experience) if isinstance(x := getattr(experience, f.name), torch.Tensor)}
    mask_BT = experience.mask_BT.clone()
    Ppo(PpoOptions()).credit(experience, kl_coef=0.1)
    for name, x in before.items():
        torch.testing.assert_close(getattr(experience, name), x, equal_nan=True)
    assert experience.mask_BT.equal(mask_BT)


def test_a_batch_of_failed_scores_moves_nothing() -> None:
    ppo, models, experience = Ppo(PpoOptions()), Models.after(2), sample_experience(2)
    credited = ppo.credit(replace(experience, scores_B=torch.full_like(experience.scores_B, math.nan)), kl_coef=0.1)
    loss = sum_of_losses(ppo, models, credited, [range(8)])
    assert set(loss.metrics.values()) == {0.0}
    for gradient in models.gradients(loss):
        assert gradient.eq(0).all()


@pytest.mark.parametrize("name", ["behaviour_BT", "proximal_BT", "reference_BT", "values_BT"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_input_stops_before_it_spreads(name: str, bad: float) -> None:
    experience = sample_experience(3)
    getattr(experience, name)[4, 0] = bad
    with pytest.raises(NonFiniteError, match=r"\[4\]"):
        Ppo(PpoOptions()).credit(experience, kl_coef=0.1)
    experience.scores_B[4] = math.nan  # in a failed row it does not matter
    credited = Ppo(PpoOptions()).credit(experience, kl_coef=0.1)
    assert credited.advantages_BT is not None and credited.advantages_BT.isfinite().all()


def test_infinite_score_stops() -> None:
    experience = sample_experience(3)
    experience.scores_B[1] = math.inf
    with pytest.raises(NonFiniteError, match=r"scores of rollouts \[1\]"):
        Ppo(PpoOptions()).credit(experience, kl_coef=0.1)


def test_metrics_table() -> None:
    # Ratios 1.5, 1, 0.5 with advantages 1, 1, -1 and clip 0.2: losses -1.2, -1, 0.8 (tokens 0 and 2 clipped).
    # approx_kl: (0.5 - log 1.5) + 0 + (-0.5 + log 2) = log(4 / 3) = 0.287682. Values 2, 0.6, 1.5 against old 1, 0.5, 1.5
    # and returns 3, 0.5, 2.5, value_clip 0.2: squares 1 (clipped 1.8^2 = 3.24), 0.01, 1. Means over 3 tokens, values halved.
    ppo = Ppo(PpoOptions(value_coef=0.1))
    minibatch = Minibatch.from_rows(ppo.credit(one_row(), kl_coef=0.1), torch.tensor([0]))
    minibatch = replace(minibatch, advantages_BT=torch.tensor([[1.0, 1.0, -1.0]]), returns_BT=torch.tensor([[3.0, 0.5, 2.5]]))
    outputs = PolicyOutputs(
        logprobs_BT=minibatch.proximal_BT + torch.tensor([[1.5, 1.0, 0.5]]).log(),
        values_BT=torch.tensor([[2.0, 0.6, 1.5]]),
        entropy_BT=torch.tensor([[1.0, 2.0, 4.5]]),
    )
    loss = ppo.loss(outputs, minibatch, Totals(tokens=3, sequences=1))
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


def test_without_values_it_says_so() -> None:
    ppo, experience = Ppo(PpoOptions()), sample_experience(7)
    with pytest.raises(ValueError, match="the experience has none"):
        ppo.credit(replace(experience, values_BT=None), kl_coef=0.1)
    minibatch = Minibatch.from_rows(ppo.credit(experience, kl_coef=0.1), torch.arange(8))
    outputs = replace(Models.after(7).outputs(minibatch.tokens), values_BT=None)
    with pytest.raises(ValueError, match="critic's values"):
        ppo.loss(outputs, minibatch, Totals(tokens=10, sequences=8))
