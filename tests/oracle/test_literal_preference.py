"""The Bradley-Terry losses against literal versions over floats and a table worked out by hand."""

from __future__ import annotations

import math
import random

import pytest
import torch

from app.numerics import group_bradley_terry_loss, pair_bradley_terry_loss

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def literal_pair_losses(scores: list[float], score_l2: float, margin: float) -> list[float]:
    losses = []
    for i in range(len(scores)):
        for j in range(i + 1, len(scores)):
            probability = 1 / (1 + math.exp(scores[j] - scores[i] + margin * (j - i)))
            losses.append(-math.log(probability) + score_l2 * (scores[i] ** 2 + scores[j] ** 2) / 2)
    return losses


def test_table() -> None:
    # One group of scores 2, 0, 0. Pairs (2,0), (2,0), (0,0): -log sigmoid = 0.126928, 0.126928, 0.693147.
    # With score_l2 0.1 add 0.1 * 0.5 * (4 + 0) = 0.2 twice, and 0. Mean: (0.326928 + 0.326928 + 0.693147) / 3 = 0.449001.
    # A second group 1, -1: 0.126928 + 0.1 * 0.5 * (1 + 1) = 0.226928. Sum over 4 groups of the whole step: 0.675929 / 4.
    scores_N = torch.tensor([2.0, 0.0, 0.0, 1.0, -1.0])
    loss = group_bradley_terry_loss(scores_N, [3, 2], score_l2=0.1, num_groups=4)
    torch.testing.assert_close(loss, torch.tensor(0.16898225), **CLOSE)


def test_table_of_pairs_and_margins() -> None:
    # The five scores of above, margin 1: leads are 2 - 1, 2 - 2, 0 - 1 and 2 - 1, so that -log sigmoid = 0.313262, 0.693147,
    # 1.313262 and 0.313262. Without L2 their sum over 4 pairs is 2.632933 / 4; by groups (2.319671 / 3 + 0.313262) / 2.
    scores_N = torch.tensor([2.0, 0.0, 0.0, 1.0, -1.0])
    pairs = pair_bradley_terry_loss(scores_N, [3, 2], score_l2=0.0, num_pairs=4, margin=1.0)
    torch.testing.assert_close(pairs, torch.tensor(0.65823325), **CLOSE)
    groups = group_bradley_terry_loss(scores_N, [3, 2], score_l2=0.0, num_groups=2, margin=1.0)
    torch.testing.assert_close(groups, torch.tensor(0.54324283), **CLOSE)


@pytest.mark.parametrize("margin", [0.0, 0.7])
@pytest.mark.parametrize("score_l2", [0.0, 0.001, 0.3])
def test_literal(score_l2: float, margin: float) -> None:
    draw = random.Random(17)
    sizes = [2, 5, 3, 2, 4]
    groups = [[draw.gauss(0, 1.5) for _ in range(size)] for size in sizes]
    flat_N = torch.tensor([score for group in groups for score in group])
    losses = [literal_pair_losses(group, score_l2, margin) for group in groups]
    means = torch.tensor(sum(sum(group) / len(group) for group in losses) / 11)
    torch.testing.assert_close(group_bradley_terry_loss(flat_N, sizes, score_l2=score_l2, num_groups=11, margin=margin), means, **CLOSE)
    total = torch.tensor(sum(sum(group) for group in losses) / 31)
    torch.testing.assert_close(pair_bradley_terry_loss(flat_N, sizes, score_l2=score_l2, num_pairs=31, margin=margin), total, **CLOSE)


def test_pairs_are_a_two_way_classification() -> None:
    scores_N = torch.randn(9, generator=torch.Generator().manual_seed(3))
    logits_P2 = torch.stack([torch.stack([scores_N[i], scores_N[j]]) for i, j in [(0, 1), (0, 2), (1, 2)]])
    expected = torch.nn.functional.cross_entropy(logits_P2, torch.zeros(3, dtype=torch.long))
    torch.testing.assert_close(pair_bradley_terry_loss(scores_N[:3], [3], score_l2=0.0, num_pairs=3), expected, **CLOSE)
