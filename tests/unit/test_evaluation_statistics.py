"""Intervals against hand tables, a literal bootstrap and their coverage of known truths."""

from __future__ import annotations

import numpy as np
import pytest

from app import evaluation_statistics
from app.evaluation_statistics import Interval, mean_interval, paired_bootstrap, win_rate


def test_json_form() -> None:
    assert Interval(0.5, 0.25, 0.75).as_dict() == {"mean": 0.5, "low": 0.25, "high": 0.75}


def test_equal_values_have_no_width() -> None:
    assert paired_bootstrap([2.0] * 7, 200, seed=1) == Interval(2.0, 2.0, 2.0)


def test_two_values_by_hand() -> None:
    # Means of two draws from {0, 1}: 0 (1/4), 0.5 (1/2), 1 (1/4); 2.5 % and 97.5 % of those are 0 and 1.
    assert mean_interval([0.0, 1.0], 4000, seed=3) == Interval(0.5, 0.0, 1.0)


def test_width_is_the_normal_one_for_many_values() -> None:
    values = np.random.default_rng(0).normal(1.0, 2.0, size=900)
    interval = mean_interval(values, 4000, seed=5)
    half = 1.96 * values.std() / 30
    assert interval.mean == pytest.approx(values.mean())
    assert interval.high - interval.mean == pytest.approx(half, rel=0.06)
    assert interval.mean - interval.low == pytest.approx(half, rel=0.06)


def test_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(7)
    covered = 0
    for trial in range(200):
        interval = paired_bootstrap(rng.normal(0.3, 1.0, size=60), 400, seed=trial)
        covered += interval.low <= 0.3 <= interval.high
    assert 0.89 <= covered / 200 <= 0.99


def test_seed_decides_and_blocks_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    values = list(np.random.default_rng(1).normal(size=50))
    once = mean_interval(values, 500, seed=9)
    assert mean_interval(values, 500, seed=9) == once
    assert mean_interval(values, 500, seed=10) != once
    monkeypatch.setattr(evaluation_statistics, "RESAMPLED_VALUES", 350)
    assert mean_interval(values, 500, seed=9) == once


def test_win_rate_counts_ties_half() -> None:
    # wins: 2 > 1, 5 > 0; tie: 3 = 3; loss: 1 < 4
    interval = win_rate([2, 3, 1, 5], [1, 3, 4, 0], 500, seed=2)
    assert interval.mean == (1 + 0.5 + 0 + 1) / 4
    assert 0.0 <= interval.low < interval.mean < interval.high <= 1.0
    assert win_rate([1, 1], [1, 1], 200, seed=2) == Interval(0.5, 0.5, 0.5)


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [[1.0], [2.0]]])
def test_values_without_a_mean_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match=r"non-empty|not finite"):
        mean_interval(values, 100, seed=1)


def test_win_rate_refuses_other_lengths_and_missing_scores() -> None:
    with pytest.raises(ValueError, match="pairs"):
        win_rate([1.0], [1.0, 2.0], 100, seed=1)
    with pytest.raises(ValueError, match="finite"):
        win_rate([float("nan")], [1.0], 100, seed=1)
