"""Ranking metrics: what they may not depend on, and that they are numbers whatever the scores."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from app.numerics import ranking_metrics, ranking_sums

SIZES = [3, 2, 5, 4]
TOTAL = sum(SIZES)


def test_sums_of_parts_are_the_sums_of_the_whole() -> None:
    scores_N = torch.randn(TOTAL, generator=torch.Generator().manual_seed(6))
    parts: Counter[str] = Counter()
    for part_N, size in zip(scores_N.split(SIZES), SIZES, strict=True):
        parts.update(ranking_sums(part_N, [size]))
    assert dict(parts) == pytest.approx(ranking_sums(scores_N, SIZES))
    assert ranking_metrics(parts) == pytest.approx(ranking_metrics(ranking_sums(scores_N, SIZES)))


def test_a_constant_scorer_knows_nothing_and_says_so() -> None:
    metrics = ranking_metrics(ranking_sums(torch.full((TOTAL,), 0.1), SIZES))
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["pair_accuracy"] == metrics["best_vs_worst"] == metrics["mean_p_chosen"] == 0.5
    for name in ("kendall_tau", "spearman", "score_std", "score_gap", "calibration_error"):
        assert metrics[name] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(("sign", "accuracy", "correlation"), [(-1.0, 1.0, 1.0), (1.0, 0.0, -1.0)])
def test_perfect_and_reversed_orders(sign: float, accuracy: float, correlation: float) -> None:
    metrics = ranking_metrics(ranking_sums(sign * torch.arange(TOTAL), SIZES))
    assert metrics["pair_accuracy"] == metrics["best_vs_worst"] == accuracy
    assert metrics["kendall_tau"] == pytest.approx(correlation)
    assert metrics["spearman"] == pytest.approx(correlation)
    assert metrics["score_gap"] == -sign * (sum(SIZES) / 4 - 1)


def test_order_metrics_only_see_the_order_within_groups() -> None:
    scores_N = torch.randn(TOTAL, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    shift_N = torch.tensor([5.0, -3.0, 0.0, 100.0]).repeat_interleave(torch.tensor(SIZES))
    plain = ranking_metrics(ranking_sums(scores_N, SIZES))
    moved = ranking_metrics(ranking_sums(scores_N + shift_N, SIZES))
    for name in plain.keys() - {"score_mean", "score_std", "best_score", "worst_score"}:
        assert moved[name] == pytest.approx(plain[name], abs=1e-6)


def test_scores_that_are_no_numbers_are_seen_in_the_metrics() -> None:
    scores_N = torch.zeros(TOTAL)
    scores_N[4] = float("nan")
    assert math.isnan(ranking_metrics(ranking_sums(scores_N, SIZES))["score_mean"])


@pytest.mark.parametrize("sizes", [[3, 1], [], [3, 3]], ids=["one reply", "no group", "too many scores asked"])
def test_groups_that_cannot_be_ranked(sizes: list[int]) -> None:
    with pytest.raises(ValueError, match="replies"):
        ranking_sums(torch.zeros(4), sizes)
