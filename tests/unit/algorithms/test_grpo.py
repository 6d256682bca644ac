"""GRPO: advantages within a group by hand, where the penalty stands, and what its loss averages."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from app.algorithms.grpo import Grpo, GrpoOptions
from app.algorithms.surrogate import Surrogate
from app.experience import Minibatch, Totals
from tests.bigram_models import Models, one_row, sample_experience

IN_LOSS = Surrogate(kl_in_reward=False, kl_in_loss="k3")


def test_advantages_table() -> None:
    """Groups of `sample_experience`: rows 0, 2, 6; rows 3, 5; rows 1, 4, 7."""
    # Group 0: 1, 2, 6: mean 3, deviation sqrt((4 + 1 + 9) / 2) = sqrt 7. Group 1: 0, 2: mean 1, deviation sqrt 2. Group 2: all 5.
    scores_B = torch.tensor([1.0, 5.0, 2.0, 0.0, 5.0, 2.0, 6.0, 5.0], dtype=torch.float64)
    experience = replace(sample_experience(1), scores_B=scores_B, values_BT=None)
    credited = Grpo(GrpoOptions(), IN_LOSS).credit(experience, kl_coef=0.1)
    three, two = math.sqrt(7) + 1e-4, math.sqrt(2) + 1e-4
    expected_B = torch.tensor([-2 / three, 0, -1 / three, -1 / two, 0, 1 / two, 3 / three, 0], dtype=torch.float64)
    assert credited.advantages_BT is not None
    torch.testing.assert_close(credited.advantages_BT, expected_B[:, None] * credited.mask_BT)
    assert credited.returns_BT is not None and credited.returns_BT.equal(credited.advantages_BT)
    plain = Grpo(GrpoOptions(divide_by_std=False), IN_LOSS).credit(experience, kl_coef=0.1)
    expected_B = torch.tensor([-2.0, 0, -1, -1, 0, 1, 3, 0], dtype=torch.float64)
    torch.testing.assert_close(plain.advantages_BT, expected_B[:, None] * credited.mask_BT)


def test_the_penalty_is_part_of_what_is_compared_only_in_the_reward() -> None:
    experience = replace(sample_experience(2), values_BT=None)
    in_loss, in_reward = Grpo(GrpoOptions(), IN_LOSS), Grpo(GrpoOptions(), Surrogate())
    light, heavy = (in_loss.credit(experience, kl_coef=coef).advantages_BT for coef in (0.1, 0.9))
    assert light is not None and heavy is not None and light.equal(heavy)
    light, heavy = (in_reward.credit(experience, kl_coef=coef).advantages_BT for coef in (0.1, 0.9))
    assert light is not None and heavy is not None and not light.equal(heavy)
    assert (in_reward.usual_kl_place, in_reward.compares_samples, in_reward.has_critic) == ("loss", True, False)


def test_mean_over_sequences_gives_a_long_response_no_more_weight() -> None:
    """At ratio 1 and advantages 1 both means are -1; the share of one row is 1 / rows, or its share of the tokens."""
    experience = replace(sample_experience(3), values_BT=None)
    for mean_over in ("sequences", "tokens"):
        grpo = Grpo(GrpoOptions(mean_over=mean_over))  # type: ignore[arg-type]
        credited = grpo.credit(experience, kl_coef=0.0)
        credited = replace(credited, advantages_BT=credited.mask_BT.double())
        totals = Totals(tokens=int(credited.mask_BT.sum()), sequences=8)
        for row in range(8):
            minibatch = Minibatch.from_rows(credited, torch.tensor([row]))
            share = grpo.loss(Models.before(3).outputs(minibatch.tokens), minibatch, totals).policy.item()
            tokens = int(credited.mask_BT[row].sum())
            assert share == pytest.approx(-1 / 8 if mean_over == "sequences" else -tokens / totals.tokens)


def test_a_group_of_which_one_score_is_left_teaches_nothing() -> None:
    experience = replace(sample_experience(4), values_BT=None)
    scores_B = experience.scores_B.clone()
    scores_B[3] = math.nan  # row 5 is left alone
    credited = Grpo(GrpoOptions(), IN_LOSS).credit(replace(experience, scores_B=scores_B), kl_coef=0.1)
    assert credited.mask_BT[5].any()
    assert credited.advantages_BT is not None and credited.advantages_BT[5].eq(0).all()


def test_needs_groups() -> None:
    with pytest.raises(ValueError, match="no groups_B"):
        Grpo(GrpoOptions()).credit(one_row(values_BT=None), kl_coef=0.1)
