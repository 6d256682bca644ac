"""GAE against a literal version over floats and against tables worked out by hand."""

from __future__ import annotations

import random

import pytest
import torch

from app.numerics import generalized_advantages

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def literal_advantages(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """One response, by the definition A_t = sum_k (gamma lam)^k delta_{t+k}: no recursion, so no shared shape with the code."""
    length = len(rewards)
    deltas = []
    for t in range(length):
        value_after = values[t + 1] if t + 1 < length else 0.0
        deltas.append(rewards[t] + gamma * value_after - values[t])
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, length)) for t in range(length)]


@pytest.mark.parametrize(
    ("gamma", "lam", "expected"),
    [
        # rewards 0, 0, 2 and values 1.0, 0.5, 1.5; value after the end 0.
        # gamma = 1: deltas 0 + 0.5 - 1 = -0.5; 0 + 1.5 - 0.5 = 1; 2 + 0 - 1.5 = 0.5
        (1.0, 1.0, [1.0, 1.5, 0.5]),  # 1 + 0.5 = 1.5; -0.5 + 1.5 = 1.0; and = return 2 minus values
        (1.0, 0.0, [-0.5, 1.0, 0.5]),  # the deltas themselves
        (1.0, 0.5, [0.125, 1.25, 0.5]),  # 1 + 0.25 = 1.25; -0.5 + 0.625 = 0.125
        (1.0, 0.9, [0.805, 1.45, 0.5]),  # 1 + 0.45 = 1.45; -0.5 + 0.9 * 1.45 = 0.805
        (1.0, 0.95, [0.90125, 1.475, 0.5]),  # 1 + 0.475 = 1.475; -0.5 + 0.95 * 1.475 = 0.90125
        # gamma = 0.5: deltas 0.25 - 1 = -0.75; 0.75 - 0.5 = 0.25; 2 - 1.5 = 0.5
        (0.5, 1.0, [-0.5, 0.5, 0.5]),  # 0.25 + 0.5 * 0.5 = 0.5; -0.75 + 0.5 * 0.5 = -0.5
    ],
)
def test_table(gamma: float, lam: float, expected: list[float]) -> None:
    rewards_BT, values_BT = torch.tensor([[0.0, 0.0, 2.0]]), torch.tensor([[1.0, 0.5, 1.5]])
    mask_BT = torch.ones(1, 3, dtype=torch.bool)
    actual = generalized_advantages(rewards_BT, values_BT, mask_BT, gamma=gamma, lam=lam)
    torch.testing.assert_close(actual, torch.tensor([expected]), **CLOSE)


def test_table_with_padding_behind_the_end() -> None:
    # Two rows of the table above: the second ends after two tokens, with rewards 0, 2 and values 1.0, 0.5.
    # lam = 0.9: deltas 0.5 - 1 = -0.5; 2 - 0.5 = 1.5; A = -0.5 + 0.9 * 1.5 = 0.85, 1.5. The padding holds a value of 7,
    # which would give 2 + 7 - 0.5 = 8.5 if it were read.
    rewards_BT = torch.tensor([[0.0, 0.0, 2.0], [0.0, 2.0, 0.0]])
    values_BT = torch.tensor([[1.0, 0.5, 1.5], [1.0, 0.5, 7.0]])
    mask_BT = torch.tensor([[True, True, True], [True, True, False]])
    actual = generalized_advantages(rewards_BT, values_BT, mask_BT, gamma=1.0, lam=0.9)
    torch.testing.assert_close(actual, torch.tensor([[0.805, 1.45, 0.5], [0.85, 1.5, 0.0]]), **CLOSE)


@pytest.mark.parametrize("lam", [0.0, 0.9, 0.95, 1.0])
@pytest.mark.parametrize("gamma", [0.9, 1.0])
@pytest.mark.parametrize("gaps", [False, True], ids=["right-padded", "gaps"])
def test_literal(gamma: float, lam: float, gaps: bool) -> None:
    """Random batches; with gaps, masked positions also lie between response tokens and are skipped, not bridged by zeros."""
    draw = random.Random(7)
    longest, rows = 9, 6
    mask = [[draw.random() < 0.6 if gaps else t <= row for t in range(longest)] for row in range(rows)]
    rewards = [[draw.gauss(0, 1) for _ in range(longest)] for _ in range(rows)]
    values = [[draw.gauss(0, 1) for _ in range(longest)] for _ in range(rows)]
    expected = [[0.0] * longest for _ in range(rows)]
    for row in range(rows):
        kept = [t for t in range(longest) if mask[row][t]]
        for t, advantage in zip(
            kept, literal_advantages([rewards[row][t] for t in kept], [values[row][t] for t in kept], gamma, lam), strict=True
        ):
            expected[row][t] = advantage
    actual = generalized_advantages(torch.tensor(rewards), torch.tensor(values), torch.tensor(mask), gamma=gamma, lam=lam)
    torch.testing.assert_close(actual, torch.tensor(expected), **CLOSE)
