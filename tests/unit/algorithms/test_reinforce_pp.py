"""REINFORCE++: rewards to go by hand, whitening over the batch, and the baseline within a group."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from app.algorithms.reinforce_pp import ReinforcePp, ReinforcePpOptions
from tests.bigram_models import one_row, sample_experience

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def test_rewards_to_go_table() -> None:
    # Rewards -0.05, 0.1, 2.8 (see PPO's table): sums from each token on 2.85, 2.9, 2.8; mean 2.85, variance 0.005 / 3.
    credited = ReinforcePp(ReinforcePpOptions()).credit(one_row(values_BT=None), kl_coef=0.1)
    torch.testing.assert_close(credited.returns_BT, torch.tensor([[2.85, 2.9, 2.8]]), **CLOSE)
    step = 0.05 / (0.005 / 3) ** 0.5
    torch.testing.assert_close(credited.advantages_BT, torch.tensor([[0.0, step, -step]]), rtol=1e-4, atol=1e-4)
    # gamma 0.5: 2.8; 0.1 + 1.4 = 1.5; -0.05 + 0.75 = 0.7
    halved = ReinforcePp(ReinforcePpOptions(gamma=0.5)).credit(one_row(values_BT=None), kl_coef=0.1)
    torch.testing.assert_close(halved.returns_BT, torch.tensor([[0.7, 1.5, 2.8]]), **CLOSE)


def test_advantages_have_mean_0_and_variance_1_over_the_batch() -> None:
    experience = sample_experience(1)
    credited = ReinforcePp(ReinforcePpOptions()).credit(replace(experience, values_BT=None), kl_coef=0.1)
    assert credited.advantages_BT is not None
    chosen = credited.advantages_BT[credited.mask_BT]
    assert chosen.mean().item() == pytest.approx(0, abs=1e-9)
    assert chosen.var(unbiased=False).item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("score", [10.3, 83.3, 777.7])
def test_a_batch_of_equal_scores_teaches_nothing(score: float) -> None:
    """As from a rule that all responses pass, without a penalty in the reward."""
    experience = replace(sample_experience(3), values_BT=None)
    single = {name: getattr(experience, name).float() for name in ("behaviour_BT", "proximal_BT", "reference_BT")}
    equal = replace(experience, scores_B=torch.full((len(experience.tokens),), score), **single)
    credited = ReinforcePp(ReinforcePpOptions()).credit(equal, kl_coef=0.0)
    assert credited.advantages_BT is not None and credited.advantages_BT.eq(0).all()


def test_group_baseline_is_subtracted_once() -> None:
    """At gamma 1 every token of a response loses the mean score of its group, before whitening."""
    experience = replace(sample_experience(2), values_BT=None)
    plain = ReinforcePp(ReinforcePpOptions()).credit(experience, kl_coef=0.1)
    based = ReinforcePp(ReinforcePpOptions(group_baseline=True)).credit(experience, kl_coef=0.1)
    assert experience.groups_B is not None and plain.returns_BT is not None and based.returns_BT is not None
    means_B = torch.stack([experience.scores_B[experience.groups_B == group].mean() for group in experience.groups_B])
    torch.testing.assert_close(plain.returns_BT - based.returns_BT, means_B[:, None] * plain.mask_BT)
    torch.testing.assert_close(plain.rewards_BT, based.rewards_BT)


def test_only_the_baseline_needs_groups() -> None:
    assert not ReinforcePp(ReinforcePpOptions()).compares_samples
    based = ReinforcePp(ReinforcePpOptions(group_baseline=True))
    assert based.compares_samples
    with pytest.raises(ValueError, match="no groups_B"):
        based.credit(one_row(values_BT=None), kl_coef=0.1)
