"""RLOO: the leave-one-out baseline by hand, and that it leaves the gradient unbiased."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from app.algorithms.rloo import Rloo, RlooOptions
from app.algorithms.surrogate import Surrogate
from app.numerics import leave_one_out
from tests.bigram_models import one_row, sample_experience


def test_advantages_table() -> None:
    """Groups of `sample_experience`: rows 0, 2, 6; rows 3, 5; rows 1, 4, 7."""
    # 1, 2, 6: 1 - 4, 2 - 3.5, 6 - 1.5; 0, 2: -2, 2; 5, 5, 8: 5 - 6.5, 5 - 6.5, 8 - 5.
    scores_B = torch.tensor([1.0, 5.0, 2.0, 0.0, 5.0, 2.0, 6.0, 8.0], dtype=torch.float64)
    experience = replace(sample_experience(1), scores_B=scores_B, values_BT=None)
    expected_B = torch.tensor([-3.0, -1.5, -1.5, -2.0, -1.5, 2.0, 4.5, 3.0], dtype=torch.float64)
    credited = Rloo(RlooOptions()).credit(experience, kl_coef=0.0)
    torch.testing.assert_close(credited.advantages_BT, expected_B[:, None] * credited.mask_BT)


def test_reward_of_a_response_is_score_minus_its_summed_penalty() -> None:
    experience = replace(sample_experience(2), values_BT=None)
    kl_B = (experience.proximal_BT - experience.reference_BT).sum(1)
    credited = Rloo(RlooOptions()).credit(experience, kl_coef=0.3)
    shifted = replace(experience, scores_B=experience.scores_B - 0.3 * kl_B)
    without = Rloo(RlooOptions(), Surrogate(kl_in_reward=False)).credit(shifted, kl_coef=0.3)
    torch.testing.assert_close(credited.advantages_BT, without.advantages_BT)


def test_the_baseline_leaves_the_gradient_unbiased() -> None:
    """Over every group of three samples of a policy on four outcomes, with their probabilities: the mean of A grad log p is the
    gradient of the expected score."""
    logits = torch.tensor([0.3, -1.0, 0.8, 0.1], dtype=torch.float64, requires_grad=True)
    scores = torch.tensor([2.0, -1.0, 0.5, 4.0], dtype=torch.float64)
    p = logits.softmax(-1)
    (exact,) = torch.autograd.grad((p * scores).sum(), logits, retain_graph=True)
    one_group, all_valid = torch.zeros(3).long(), torch.ones(3, dtype=torch.bool)
    objective = torch.zeros((), dtype=torch.float64)
    for outcomes in itertools.product(range(4), repeat=3):
        picked = torch.tensor(outcomes)
        advantages = leave_one_out(scores[picked], one_group, all_valid)
        objective = objective + p[picked].prod().detach() * (advantages * p[picked].log()).mean()
    (actual,) = torch.autograd.grad(objective, logits)
    torch.testing.assert_close(actual, exact)


def test_needs_groups() -> None:
    with pytest.raises(ValueError, match="no groups_B"):
        Rloo(RlooOptions()).credit(one_row(values_BT=None), kl_coef=0.1)
