"""Scores to token rewards, against a literal version over floats and tables worked out by hand."""

from __future__ import annotations

import math
import random

import pytest
import torch

from app.numerics import clip_scores, length_penalties, penalise_missing_eos, token_rewards

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def literal_shaped_score(score: float, finished: bool, clip: float | None, missing_eos_score: float | None) -> float:
    if clip is not None and score > clip:
        score = clip
    if clip is not None and score < -clip:
        score = -clip
    if not finished and missing_eos_score is not None and score > missing_eos_score:
        score = missing_eos_score
    return score


def shaped(scores: list[float], finished: list[bool], clip: float | None, missing_eos_score: float | None) -> torch.Tensor:
    return penalise_missing_eos(clip_scores(torch.tensor(scores), clip), torch.tensor(finished), replacement=missing_eos_score)


def literal_length_penalty(length: int, per_token: float, buffer: int | None, most: float, limit: int) -> float:
    penalty = per_token * length
    if buffer is None or length <= limit - buffer:
        return penalty
    return penalty + most * min(1.0, (length - (limit - buffer)) / buffer)


def literal_rewards(score: float, policy: list[float], reference: list[float], kl_coef: float) -> list[float]:
    rewards = []
    for t in range(len(policy)):
        reward = -kl_coef * (policy[t] - reference[t])
        if t == len(policy) - 1:
            reward = reward + score
        rewards.append(reward)
    return rewards


@pytest.mark.parametrize(
    ("score", "finished", "clip", "missing", "expected"),
    [
        (9.0, True, 4.0, -1.0, 4.0),  # clipped, and the end token was there
        (-9.0, True, 4.0, -1.0, -4.0),
        (0.5, False, 4.0, -1.0, -1.0),  # no end token: -1 instead of 0.5
        (-3.0, False, 4.0, -1.0, -3.0),  # no end token, but its own score is lower: running on must not pay
        (-9.0, False, 4.0, -1.0, -4.0),  # first the clip, then the comparison: -4, neither -9 nor -1
        (9.0, False, 4.0, 6.0, 4.0),  # the bound is the clipped score, and the replacement itself is not clipped
        (9.0, False, None, -1.0, -1.0),
        (9.0, False, None, None, 9.0),
        (9.0, False, 4.0, None, 4.0),
    ],
)
def test_shaped_score_table(score: float, finished: bool, clip: float | None, missing: float | None, expected: float) -> None:
    actual = shaped([score], [finished], clip, missing)
    torch.testing.assert_close(actual, torch.tensor([expected]), **CLOSE)
    assert literal_shaped_score(score, finished, clip, missing) == expected


@pytest.mark.parametrize("clip", [None, 4.0])
@pytest.mark.parametrize("missing", [None, -1.0])
@pytest.mark.parametrize("finished", [True, False])
def test_failed_score_stays_nan(clip: float | None, missing: float | None, finished: bool) -> None:
    assert shaped([math.nan], [finished], clip, missing).isnan().all()


def test_shaped_scores_literal() -> None:
    draw = random.Random(3)
    scores = [draw.gauss(0, 3) for _ in range(200)]
    finished = [draw.random() < 0.5 for _ in scores]
    actual = shaped(scores, finished, 2.5, -1.0)
    expected = [literal_shaped_score(s, f, 2.5, -1.0) for s, f in zip(scores, finished, strict=True)]
    torch.testing.assert_close(actual, torch.tensor(expected), **CLOSE)


def test_missing_eos_penalty_table() -> None:
    # 2 and 2 - 0.5; with a replacement too: min(2, -1) - 0.5, and min(-3, -1) - 0.5
    scores_B, finished_B = torch.tensor([2.0, 2.0, -3.0]), torch.tensor([True, False, False])
    subtracted = penalise_missing_eos(scores_B, finished_B, replacement=None, penalty=0.5)
    torch.testing.assert_close(subtracted, torch.tensor([2.0, 1.5, -3.5]), **CLOSE)
    both = penalise_missing_eos(scores_B, finished_B, replacement=-1.0, penalty=0.5)
    torch.testing.assert_close(both, torch.tensor([2.0, -1.5, -3.5]), **CLOSE)


@pytest.mark.parametrize("buffer", [None, 1, 4, 10])
@pytest.mark.parametrize("per_token", [0.0, 0.01])
def test_length_penalties_literal(buffer: int | None, per_token: float) -> None:
    lengths = list(range(1, 13))  # beyond the limit of 10 nothing is added
    actual = length_penalties(torch.tensor(lengths), per_token=per_token, overlong_buffer=buffer, overlong_penalty=0.7, max_length=10)
    expected = [literal_length_penalty(length, per_token, buffer, 0.7, 10) for length in lengths]
    torch.testing.assert_close(actual, torch.tensor(expected), **CLOSE)


def test_token_rewards_table() -> None:
    # kl_coef 0.1. Row 0: log-prob differences 0.5, -1.0, 2.0 -> -0.05, 0.1, -0.2, and score 3 at the last: 2.8.
    # Row 1 has one token: difference -0.5 -> 0.05, and score -1: -0.95. Row 2 has none; its score is not paid.
    policy_BT = torch.tensor([[-1.0, -2.0, -1.0], [-1.5, -4.0, -4.0], [-4.0, -4.0, -4.0]])
    reference_BT = torch.tensor([[-1.5, -1.0, -3.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    mask_BT = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    actual = token_rewards(torch.tensor([3.0, -1.0, math.nan]), policy_BT, reference_BT, mask_BT, kl_coef=0.1)
    expected = torch.tensor([[-0.05, 0.1, 2.8], [-0.95, 0.0, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(actual, expected, **CLOSE)


@pytest.mark.parametrize("kl_coef", [0.0, 0.05, 0.3])
def test_token_rewards_literal(kl_coef: float) -> None:
    draw = random.Random(5)
    longest = 8
    lengths = [1, 3, 8, 5]
    scores = [draw.gauss(0, 2) for _ in lengths]
    policy = [[-draw.expovariate(1) for _ in range(longest)] for _ in lengths]
    reference = [[-draw.expovariate(1) for _ in range(longest)] for _ in lengths]
    expected = [
        literal_rewards(scores[row], policy[row][:length], reference[row][:length], kl_coef) + [0.0] * (longest - length)
        for row, length in enumerate(lengths)
    ]
    mask_BT = torch.arange(longest) < torch.tensor(lengths)[:, None]
    actual = token_rewards(torch.tensor(scores), torch.tensor(policy), torch.tensor(reference), mask_BT, kl_coef=kl_coef)
    torch.testing.assert_close(actual, torch.tensor(expected), **CLOSE)
