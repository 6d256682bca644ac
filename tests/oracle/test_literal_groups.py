"""Comparisons within groups against literal versions over floats and tables worked out by hand."""

from __future__ import annotations

import math
import random
import statistics

import pytest
import torch

from app.numerics import centred, group_means, leave_one_out, standardised

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def literal(kind: str, scores: list[float], groups: list[int], valid: list[bool]) -> list[float]:
    """Row by row, from the list of the valid scores of its group."""
    out = []
    for row, score in enumerate(scores):
        group = [scores[k] for k in range(len(scores)) if groups[k] == groups[row] and valid[k]]
        others = [scores[k] for k in range(len(scores)) if groups[k] == groups[row] and valid[k] and k != row]
        if not valid[row]:
            out.append(0.0)
        elif kind == "mean":
            out.append(sum(group) / len(group))
        elif kind == "centred":
            out.append(score - sum(group) / len(group))
        elif not others:
            out.append(0.0)
        elif kind == "leave_one_out":
            out.append(score - sum(others) / len(others))
        else:
            out.append((score - statistics.mean(group)) / (statistics.stdev(group) + 1e-4))
    return out


FUNCTIONS = {"mean": group_means, "centred": centred, "leave_one_out": leave_one_out, "standardised": standardised}


@pytest.mark.parametrize("kind", list(FUNCTIONS))
def test_literal(kind: str) -> None:
    """Groups of one to four rows that stand mixed up; some rows failed and hold NaN."""
    draw = random.Random(17)
    groups = [draw.choice([3, 8, 2, 11, 40]) for _ in range(14)] + [99]
    valid = [draw.random() < 0.7 for _ in groups]
    scores = [draw.gauss(0, 2) if good else math.nan for good in valid]
    actual = FUNCTIONS[kind](torch.tensor(scores), torch.tensor(groups), torch.tensor(valid))
    torch.testing.assert_close(actual, torch.tensor(literal(kind, scores, groups, valid)), **CLOSE)


def test_table() -> None:
    # Group 0: 1, 2, 6 (mean 3, squares 4 + 1 + 9 = 14, / 2 = 7); group 1: one row; group 2: nobody valid.
    scores_B = torch.tensor([1.0, 5.0, 2.0, math.nan, 6.0])
    groups_B, valid_B = torch.tensor([0, 1, 0, 2, 0]), torch.tensor([True, True, True, False, True])
    torch.testing.assert_close(group_means(scores_B, groups_B, valid_B), torch.tensor([3.0, 5.0, 3.0, 0.0, 3.0]), **CLOSE)
    torch.testing.assert_close(leave_one_out(scores_B, groups_B, valid_B), torch.tensor([-3.0, 0.0, -1.5, 0.0, 4.5]), **CLOSE)
    deviation = math.sqrt(7) + 1e-4
    expected = torch.tensor([-2.0, 0.0, -1.0, 0.0, 3.0]) / deviation
    torch.testing.assert_close(standardised(scores_B, groups_B, valid_B), expected, **CLOSE)


@pytest.mark.parametrize("score", [0.1, 83.3, 1000.1, -12345.6])
@pytest.mark.parametrize("samples", [3, 6, 7])
def test_equal_scores_teach_nothing(score: float, samples: int) -> None:
    """0.1 three times has a float32 mean that is not 0.1; divided by a tiny deviation that would be an advantage."""
    scores_B, groups_B, valid_B = torch.full((samples,), score), torch.zeros(samples).long(), torch.ones(samples).bool()
    assert standardised(scores_B, groups_B, valid_B).eq(0).all() and leave_one_out(scores_B, groups_B, valid_B).eq(0).all()
