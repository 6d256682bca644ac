"""What is logged about a credited batch, worked out by hand and around failed rows."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from app.algorithms.credit import credit_metrics
from app.algorithms.ppo import Ppo, PpoOptions
from app.algorithms.rloo import Rloo, RlooOptions
from app.experience import Experience, TokenBatch
from tests.bigram_models import sample_experience


def batch() -> Experience:
    """Responses of 2, 1 and 2 tokens; the last row's score failed."""
    mask_BT = torch.tensor([[True, True], [True, False], [True, True]])
    lengths_B = torch.tensor([2, 1, 2])
    return Experience(
        tokens=TokenBatch(torch.ones(3, 3, dtype=torch.long), torch.ones(3, 3, dtype=torch.bool), torch.ones(3).long(), lengths_B, mask_BT),
        scores_B=torch.tensor([2.0, -1.0, math.nan]),
        behaviour_BT=torch.tensor([[-1.0, -2.0], [-0.9, 0.0], [-50.0, -50.0]]),
        proximal_BT=torch.tensor([[-1.0, -1.75], [-1.0, 0.0], [-1.0, -1.0]]),
        reference_BT=torch.tensor([[-1.5, -1.0], [-1.25, 0.0], [-80.0, -80.0]]),
        values_BT=torch.tensor([[1.0, 0.0], [-1.0, 0.0], [99.0, 99.0]]),
    )


def test_table() -> None:
    # k1: 0.5, -0.75 | 0.25, so sums -0.25 and 0.25: per sequence 0, per token 0. With kl_coef 1 rewards are
    # -0.5, 0.75 + 2 = 2.75 | -0.25 - 1 = -1.25; sums 2.25 and -1.25, mean 0.5.
    # lam 1: returns 2.25, 2.75 | -1.25; advantages 1.25, 2.75 | -0.25. Means 1.25 and 1.25; squares about them
    # 0 + 2.25 + 2.25 = 4.5 -> variance 1.5; returns 1 + 2.25 + 6.25 = 9.5 -> 9.5 / 3; explained 1 - 4.5 / 9.5.
    metrics = credit_metrics(Ppo(PpoOptions(lam=1.0)).credit(batch(), kl_coef=1.0))
    expected = {
        "score": 0.5,
        "reward": 0.5,
        "kl": 0.0,
        "kl_per_token": 0.0,
        "kl_coef": 1.0,
        "advantage_mean": 1.25,
        "advantage_std": math.sqrt(1.5),
        "value_mean": 0.0,
        "return_mean": 1.25,
        "explained_variance": 1 - 4.5 / 9.5,
        "response_length": 1.5,
        "max_logprob_mismatch": 0.25,
        "logprob_mismatch": 0.35 / 3,  # 0, 0.25, 0.1
        "failed_scores": 1 / 3,
    }
    assert metrics == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_kl_is_summed_per_sequence() -> None:
    # k1 of row 0: 2 and 3, of row 1: 4. Per sequence (5 + 4) / 2, per token 9 / 3.
    experience = replace(batch(), reference_BT=torch.tensor([[-3.0, -4.75], [-5.0, 0.0], [0.0, 0.0]]))
    metrics = credit_metrics(Ppo(PpoOptions()).credit(experience, kl_coef=0.1))
    assert (metrics["kl"], metrics["kl_per_token"]) == pytest.approx((4.5, 3.0))


@pytest.mark.parametrize("whiten", [False, True])
def test_advantages_are_described_before_whitening(whiten: bool) -> None:
    metrics = credit_metrics(Ppo(PpoOptions(lam=1.0, whiten_advantages=whiten)).credit(batch(), kl_coef=1.0))
    assert metrics["advantage_mean"] == pytest.approx(1.25)


@pytest.mark.parametrize("lam", [0.9, 0.95, 1.0])
def test_padding_does_not_matter(lam: float) -> None:
    ppo = Ppo(PpoOptions(lam=lam))
    tight, wide = (credit_metrics(ppo.credit(sample_experience(8, padding=n), kl_coef=0.1)) for n in (0, 4))
    assert wide == pytest.approx(tight, rel=1e-9)


def test_all_failed_is_finite() -> None:
    experience = replace(batch(), scores_B=torch.full((3,), math.nan))
    metrics = credit_metrics(Ppo(PpoOptions()).credit(experience, kl_coef=0.1))
    assert (metrics.pop("failed_scores"), metrics.pop("kl_coef")) == (1.0, pytest.approx(0.1))
    assert set(metrics.values()) == {0.0}


def test_needs_a_credited_batch() -> None:
    with pytest.raises(ValueError, match="call the algorithm's credit"):
        credit_metrics(batch())


def test_without_a_critic_nothing_is_said_of_one() -> None:
    # Rewards 2 and -1 of a group of two (the third failed): advantages 3 on two tokens and -3 on one, mean 1.
    experience = replace(batch(), values_BT=None, groups_B=torch.zeros(3).long())
    metrics = credit_metrics(Rloo(RlooOptions()).credit(experience, kl_coef=0.0))
    assert metrics["advantage_mean"] == pytest.approx(1.0)
    assert metrics["advantage_std"] == pytest.approx(math.sqrt(8))
    assert not {"value_mean", "return_mean", "explained_variance"} & metrics.keys()
