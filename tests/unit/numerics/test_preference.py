"""Ranked groups: which pairs count and how much, and what the loss may not depend on."""

from __future__ import annotations

import pytest
import torch

from app.numerics import group_bradley_terry_loss, pair_bradley_terry_loss, ranked_pairs

SIZES = [3, 2, 5, 4]


def scores() -> torch.Tensor:
    torch.manual_seed(6)
    return torch.randn(sum(SIZES), dtype=torch.float64)


def test_pairs_stay_in_their_group_and_each_group_weighs_one() -> None:
    pairs = ranked_pairs(SIZES)
    group_N = torch.repeat_interleave(torch.arange(len(SIZES)), torch.tensor(SIZES))
    assert (group_N[pairs.better_P] == pairs.group_P).all()
    assert (group_N[pairs.worse_P] == pairs.group_P).all()
    assert (pairs.better_P < pairs.worse_P).all()
    assert len({*zip(pairs.better_P.tolist(), pairs.worse_P.tolist(), strict=True)}) == 3 + 1 + 10 + 6
    weights_G = torch.zeros(len(SIZES)).index_add(0, group_N[pairs.better_P], pairs.group_weights_P)
    torch.testing.assert_close(weights_G, torch.ones(len(SIZES)))


def test_parts_of_a_step_add_up_whatever_the_split() -> None:
    scores_N = scores().requires_grad_()
    whole = group_bradley_terry_loss(scores_N, SIZES, score_l2=0.01, num_groups=4)
    (expected,) = torch.autograd.grad(whole, scores_N)
    parts = [
        group_bradley_terry_loss(scores_N[a:b], sizes, score_l2=0.01, num_groups=4)
        for a, b, sizes in [(0, 3, SIZES[:1]), (3, 10, SIZES[1:3]), (10, 14, SIZES[3:])]
    ]
    torch.testing.assert_close(sum(parts), whole)
    torch.testing.assert_close(torch.autograd.grad(sum(parts), scores_N)[0], expected)


def test_every_pair_weighs_the_same_whatever_its_group() -> None:
    scores_N = scores()
    parts = [
        pair_bradley_terry_loss(scores_N[a:b], sizes, score_l2=0.01, num_pairs=20, margin=0.1)
        for a, b, sizes in [(0, 3, SIZES[:1]), (3, 10, SIZES[1:3]), (10, 14, SIZES[3:])]
    ]
    torch.testing.assert_close(sum(parts), pair_bradley_terry_loss(scores_N, SIZES, score_l2=0.01, num_pairs=20, margin=0.1))
    by_group = [
        pairs * group_bradley_terry_loss(part_N, [size], score_l2=0.01, num_groups=20, margin=0.1)
        for pairs, size, part_N in zip((3, 1, 10, 6), SIZES, scores_N.split(SIZES), strict=True)
    ]
    torch.testing.assert_close(sum(by_group), sum(parts))


def test_evenly_spaced_scores_keep_every_margin_at_once() -> None:
    spaced_N = torch.tensor([3.0, 2.0, 1.0, 0.0])
    torch.testing.assert_close(pair_bradley_terry_loss(spaced_N, [4], score_l2=0.0, num_pairs=6, margin=1.0), torch.tensor(2.0).log())


def test_order_of_groups_does_not_matter() -> None:
    groups = scores().split(SIZES)
    order = [2, 0, 3, 1]
    shuffled_N = torch.cat([groups[i] for i in order])
    torch.testing.assert_close(
        group_bradley_terry_loss(shuffled_N, [SIZES[i] for i in order], score_l2=0.01, num_groups=4),
        group_bradley_terry_loss(scores(), SIZES, score_l2=0.01, num_groups=4),
    )


def test_only_differences_count_without_l2() -> None:
    plain = group_bradley_terry_loss(scores(), SIZES, score_l2=0.0, num_groups=4)
    torch.testing.assert_close(group_bradley_terry_loss(scores() + 5, SIZES, score_l2=0.0, num_groups=4), plain)
    assert group_bradley_terry_loss(scores() + 5, SIZES, score_l2=0.01, num_groups=4) > plain + 0.1


def test_descent_raises_the_best_and_lowers_the_worst() -> None:
    scores_N = torch.zeros(3, requires_grad=True)
    group_bradley_terry_loss(scores_N, [3], score_l2=0.0, num_groups=1).backward()
    torch.testing.assert_close(scores_N.grad, torch.tensor([-1 / 3, 0.0, 1 / 3]))  # +-1/2 in 2 of 3 pairs; 0 in the middle


def test_far_scores_stay_finite() -> None:
    scores_N = torch.tensor([-500.0, 500.0], requires_grad=True)
    loss = group_bradley_terry_loss(scores_N, [2], score_l2=0.0, num_groups=1)
    loss.backward()
    assert loss.item() == 1000.0
    assert scores_N.grad is not None
    assert scores_N.grad.tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("sizes", [[3, 1], [], [3, 3]], ids=["one reply", "no group", "too many scores asked"])
def test_groups_that_cannot_be_ranked(sizes: list[int]) -> None:
    with pytest.raises(ValueError, match="replies"):
        group_bradley_terry_loss(torch.zeros(4), sizes, score_l2=0.0, num_groups=1)
    with pytest.raises(ValueError, match="replies"):
        pair_bradley_terry_loss(torch.zeros(4), sizes, score_l2=0.0, num_pairs=1)
