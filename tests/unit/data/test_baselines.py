"""The length ranker: which way round it is turned, and its numbers by hand."""

from __future__ import annotations

import math

import pytest

from app.data.baselines import length_baseline
from app.errors import DataError
from app.formats.records import RankedGroup


def groups(*lengths: tuple[int, ...]) -> list[RankedGroup]:
    return [RankedGroup(str(n), str(n), (), tuple("x" * length for length in group)) for n, group in enumerate(lengths)]


def test_by_hand() -> None:
    # Longer is better on the training side. Held out: 3, 1, 2 has 2 of 3 pairs right, 1, 4 none, 5, 5 a tie.
    metrics = length_baseline(groups((9, 4), (1, 2), (7, 6)), groups((3, 1, 2), (1, 4), (5, 5)))
    assert metrics == pytest.approx(
        {"pair_accuracy": 2.5 / 5, "best_vs_worst": 1.5 / 3, "kendall_tau": (1 / 3 - 1 + 0) / 3, "spearman": (1 / 2 - 1 + 0) / 3}
    )


def test_turned_round_where_shorter_is_better_in_training() -> None:
    metrics = length_baseline(groups((4, 9), (1, 2)), groups((2, 3), (2, 5, 5)))
    assert metrics["pair_accuracy"] == pytest.approx(3.5 / 4)
    assert metrics["kendall_tau"] == pytest.approx((1 + 2 / math.sqrt(6)) / 2)


def test_nothing_to_compare() -> None:
    with pytest.raises(DataError, match="no ranked groups"):
        length_baseline([], groups((1, 2)))
