"""Policy and value losses against literal versions over floats and tables worked out by hand."""

from __future__ import annotations

import math
import random

import pytest
import torch

from app.numerics import clipped_policy_loss, clipped_value_loss, sequence_weights, truncated_importance

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
ONE = torch.tensor([[True]])


def literal_policy_loss(
    current: float, proximal: float, advantage: float, clip: float, clip_high: float | None = None, dual_clip: float | None = None
) -> tuple[float, bool]:
    """One token: minus the smaller of the plain and the clipped objective, which with a dual clip is at least dual_clip * A where A
    is negative; and whether one of the bounds decides."""
    ratio = math.exp(current) / math.exp(proximal)
    high = clip if clip_high is None else clip_high
    bounded = ratio
    if ratio > 1 + high:
        bounded = 1 + high
    if ratio < 1 - clip:
        bounded = 1 - clip
    plain, clipped = ratio * advantage, bounded * advantage
    objective = min(plain, clipped)
    if dual_clip is not None and advantage < 0 and objective < dual_clip * advantage:
        return -dual_clip * advantage, True
    return -objective, clipped < plain


def literal_value_loss(value: float, old: float, target: float, clip: float | None) -> tuple[float, bool]:
    plain = (value - target) * (value - target)
    if clip is None:
        return plain / 2, False
    moved = value - old
    if moved > clip:
        moved = clip
    if moved < -clip:
        moved = -clip
    clipped = (old + moved - target) * (old + moved - target)
    return (clipped if clipped > plain else plain) / 2, clipped > plain


def literal_weight(proximal: float, behaviour: float, maximum: float) -> float:
    weight = math.exp(proximal) / math.exp(behaviour)
    return maximum if weight > maximum else weight


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "clipped"),
    [
        # clip 0.2: the objective is the smaller of ratio * A and bounded ratio * A
        (1.0, 2.0, -2.0, 0.0),
        (1.5, 2.0, -2.4, 1.0),  # min(3.0, 1.2 * 2 = 2.4)
        (1.5, -2.0, 3.0, 0.0),  # min(-3.0, -2.4) = -3.0: a bad token that got likelier keeps its whole pull back
        (0.5, 2.0, -1.0, 0.0),  # min(1.0, 0.8 * 2 = 1.6)
        (0.5, -2.0, 1.6, 1.0),  # min(-1.0, -1.6)
        (1.1, 3.0, -3.3, 0.0),
        (1.5, 0.0, 0.0, 0.0),
    ],
)
def test_policy_table(ratio: float, advantage: float, expected: float, clipped: float) -> None:
    current_BT, proximal_BT = torch.tensor([[math.log(ratio) - 1.0]]), torch.tensor([[-1.0]])
    result = clipped_policy_loss(current_BT, proximal_BT, torch.tensor([[advantage]]), ONE, clip=0.2, total_tokens=1)
    torch.testing.assert_close(result.loss, torch.tensor(expected), **CLOSE)
    assert result.clip_fraction.item() == clipped


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "clipped"),
    [
        # clip 0.2 below, 0.5 above, dual clip 3
        (1.4, 2.0, -2.8, 0.0),  # within 1.5
        (1.6, 2.0, -3.0, 1.0),  # 1.5 * 2
        (0.7, -2.0, 1.6, 1.0),  # the lower bound is still 0.8
        (2.0, -1.0, 2.0, 0.0),  # bad and likelier, but not yet three times
        (8.0, -1.0, 3.0, 1.0),  # 8 is cut to 3
        (8.0, 1.0, -1.5, 1.0),  # the dual clip is for negative advantages only
    ],
)
def test_two_bounds_and_dual_clip_table(ratio: float, advantage: float, expected: float, clipped: float) -> None:
    current_BT, zero_BT = torch.tensor([[math.log(ratio)]]), torch.zeros(1, 1)
    bounds = {"clip": 0.2, "clip_high": 0.5, "dual_clip": 3.0}
    result = clipped_policy_loss(current_BT, zero_BT, torch.tensor([[advantage]]), ONE, total_tokens=1, **bounds)  # type: ignore[arg-type]
    torch.testing.assert_close(result.loss, torch.tensor(expected), **CLOSE)
    assert result.clip_fraction.item() == clipped


@pytest.mark.parametrize(
    ("value", "old", "target", "clip", "expected", "clipped"),
    [
        (2.0, 0.0, 3.0, 0.5, 3.125, 1.0),  # plain (2 - 3)^2 = 1; clipped (0.5 - 3)^2 = 6.25; half of the larger
        (0.4, 0.0, 3.0, 0.5, 3.38, 0.0),  # not moved far: (0.4 - 3)^2 = 6.76
        (-2.0, 0.0, 3.0, 0.5, 12.5, 0.0),  # moved away: plain 25 beats clipped (-0.5 - 3)^2 = 12.25
        (2.0, 0.0, 3.0, None, 0.5, 0.0),
        (1.0, 2.0, 1.0, 0.5, 0.125, 1.0),  # at its target, yet (1.5 - 1)^2 = 0.25 counts
    ],
)
def test_value_table(value: float, old: float, target: float, clip: float | None, expected: float, clipped: float) -> None:
    tensors = torch.tensor([[value]]), torch.tensor([[old]]), torch.tensor([[target]])
    result = clipped_value_loss(*tensors, ONE, clip=clip, total_tokens=1)
    torch.testing.assert_close(result.loss, torch.tensor(expected), **CLOSE)
    assert result.clip_fraction.item() == clipped


@pytest.mark.parametrize(
    ("proximal", "behaviour", "expected"),
    [(0.2, 0.4, 0.5), (0.4, 0.2, 2.0), (0.9, 0.1, 2.0), (0.3, 0.2, 1.5)],  # 9 is cut to 2
)
def test_importance_table(proximal: float, behaviour: float, expected: float) -> None:
    actual = truncated_importance(torch.tensor([[proximal]]).log(), torch.tensor([[behaviour]]).log(), ONE, maximum=2.0)
    torch.testing.assert_close(actual, torch.tensor([[expected]]), **CLOSE)


def test_denominator_is_the_total_given() -> None:
    # Two of four positions count: losses -1 and -1 at ratio 1, over 8 tokens of the whole step: -2 / 8, not -2 / 2.
    zeros_BT = torch.zeros(1, 4)
    mask_BT = torch.tensor([[True, True, False, False]])
    result = clipped_policy_loss(zeros_BT, zeros_BT, torch.ones(1, 4), mask_BT, clip=0.2, total_tokens=8)
    torch.testing.assert_close(result.loss, torch.tensor(-0.25), **CLOSE)


@pytest.mark.parametrize(("clip_high", "dual_clip"), [(None, None), (0.4, None), (None, 1.3), (0.1, 1.2)])
@pytest.mark.parametrize("weighted", [False, True], ids=["on-policy", "weighted"])
def test_policy_literal(weighted: bool, clip_high: float | None, dual_clip: float | None) -> None:
    draw = random.Random(11)
    lengths, longest, total = [4, 1, 6, 3], 6, 37
    current, proximal, behaviour, advantages = (
        [[draw.gauss(mean, 0.4) for _ in range(longest)] for _ in lengths] for mean in (-1, -1, -1, 0)
    )
    loss, clipped = 0.0, 0
    for row, length in enumerate(lengths):
        for t in range(length):
            token_loss, token_clipped = literal_policy_loss(
                current[row][t], proximal[row][t], advantages[row][t], 0.2, clip_high, dual_clip
            )
            weight = literal_weight(proximal[row][t], behaviour[row][t], 1.3) if weighted else 1.0
            loss += weight * token_loss / total
            clipped += token_clipped
    mask_BT = torch.arange(longest) < torch.tensor(lengths)[:, None]
    proximal_BT = torch.tensor(proximal)
    weights_BT = truncated_importance(proximal_BT, torch.tensor(behaviour), mask_BT, maximum=1.3) if weighted else None
    actual = clipped_policy_loss(
        torch.tensor(current),
        proximal_BT,
        torch.tensor(advantages),
        mask_BT,
        clip=0.2,
        clip_high=clip_high,
        dual_clip=dual_clip,
        total_tokens=total,
        weights_BT=weights_BT,
    )
    assert 0 < clipped < sum(lengths)
    torch.testing.assert_close(actual.loss, torch.tensor(loss), **CLOSE)
    torch.testing.assert_close(actual.clip_fraction, torch.tensor(clipped / total), **CLOSE)


@pytest.mark.parametrize("clip", [None, 0.2])
def test_value_literal(clip: float | None) -> None:
    draw = random.Random(13)
    lengths, longest, total = [4, 1, 6, 3], 6, 29
    values, old, targets = ([[draw.gauss(0, 1) for _ in range(longest)] for _ in lengths] for _ in range(3))
    pairs = [
        literal_value_loss(values[row][t], old[row][t], targets[row][t], clip) for row, length in enumerate(lengths) for t in range(length)
    ]
    mask_BT = torch.arange(longest) < torch.tensor(lengths)[:, None]
    actual = clipped_value_loss(torch.tensor(values), torch.tensor(old), torch.tensor(targets), mask_BT, clip=clip, total_tokens=total)
    torch.testing.assert_close(actual.loss, torch.tensor(sum(loss for loss, _ in pairs) / total), **CLOSE)
    torch.testing.assert_close(actual.clip_fraction, torch.tensor(sum(c for _, c in pairs) / total), **CLOSE)


def test_sequence_weights_give_the_mean_of_means() -> None:
    # Losses at ratio 1 are -A. Row means 2 and 5, their mean 3.5; over tokens it would be (1 + 3 + 5) / 3.
    advantages_BT = torch.tensor([[1.0, 3.0], [5.0, 9.0]])
    mask_BT = torch.tensor([[True, True], [True, False]])
    zeros_BT = torch.zeros(2, 2)
    weights_BT = sequence_weights(mask_BT, total_tokens=3, total_sequences=2)
    result = clipped_policy_loss(zeros_BT, zeros_BT, advantages_BT, mask_BT, clip=0.2, total_tokens=3, weights_BT=weights_BT)
    torch.testing.assert_close(result.loss, torch.tensor(-3.5), **CLOSE)
