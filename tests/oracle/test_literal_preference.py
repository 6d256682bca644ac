"""The Bradley-Terry group loss against a literal version over floats and a table worked out by hand."""

from __future__ import annotations

import math
import random

import pytest
import torch

from app.numerics import best_worst_hits, group_bradley_terry_loss, pair_hits

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def literal_group_loss(scores: list[float], score_l2: float) -> float:
    losses = []
    for i in range(len(scores)):
        for j in range(i + 1, len(scores)):
            probability = 1 / (1 + math.exp(scores[j] - scores[i]))
            losses.append(-math.log(probability) + score_l2 * (scores[i] ** 2 + scores[j] ** 2) / 2)
    return sum(losses) / len(losses)


def literal_hits(scores: list[float]) -> float:
    hits = 0.0
    for i in range(len(scores)):
        for j in range(i + 1, len(scores)):
            hits += 1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0
    return hits


def test_table() -> None:
    # One group of scores 2, 0, 0. Pairs (2,0), (2,0), (0,0): -log sigmoid = 0.126928, 0.126928, 0.693147.
    # With score_l2 0.1 add 0.1 * 0.5 * (4 + 0) = 0.2 twice, and 0. Mean: (0.326928 + 0.326928 + 0.693147) / 3 = 0.449001.
    # A second group 1, -1: 0.126928 + 0.1 * 0.5 * (1 + 1) = 0.226928. Sum over 4 groups of the whole step: 0.675929 / 4.
    scores_N = torch.tensor([2.0, 0.0, 0.0, 1.0, -1.0])
    loss = group_bradley_terry_loss(scores_N, [3, 2], score_l2=0.1, num_groups=4)
    torch.testing.assert_close(loss, torch.tensor(0.16898225), **CLOSE)


@pytest.mark.parametrize("score_l2", [0.0, 0.001, 0.3])
def test_literal(score_l2: float) -> None:
    draw = random.Random(17)
    sizes = [2, 5, 3, 2, 4]
    groups = [[draw.gauss(0, 1.5) for _ in range(size)] for size in sizes]
    flat_N = torch.tensor([score for group in groups for score in group])
    expected = sum(literal_group_loss(group, score_l2) for group in groups) / 11
    torch.testing.assert_close(group_bradley_terry_loss(flat_N, sizes, score_l2=score_l2, num_groups=11), torch.tensor(expected), **CLOSE)


def test_hits_literal() -> None:
    draw = random.Random(19)
    sizes = [2, 5, 3, 2, 4, 5, 5]
    groups = [[float(draw.randrange(4)) for _ in range(size)] for size in sizes]  # few levels, so there are ties
    flat_N = torch.tensor([score for group in groups for score in group])
    assert pair_hits(flat_N, sizes) == (sum(literal_hits(group) for group in groups), sum(n * (n - 1) // 2 for n in sizes))
    assert best_worst_hits(flat_N, sizes) == (sum(literal_hits([group[0], group[-1]]) for group in groups), len(sizes))
