"""Running moments: the same as those of all numbers at once, however they were split."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from app.numerics import Moments

X = torch.tensor([4.0, -1.0, 2.5, 100.0, 3.0, 3.0, -7.0])


@pytest.mark.parametrize("cuts", [[7], [1, 6], [3, 4], [1] * 7])
def test_batches_add_up(cuts: list[int]) -> None:
    moments = Moments()
    for part in X.split(cuts):
        moments = moments.updated(part)
    assert moments.count == 7
    assert moments.mean == pytest.approx(X.mean().item())
    assert moments.std == pytest.approx(X.std(unbiased=False).item())


def test_failed_scores_are_not_seen() -> None:
    assert Moments().updated(torch.tensor([1.0, math.nan, 3.0, math.inf])) == Moments().updated(torch.tensor([1.0, 3.0]))
    assert Moments().updated(torch.tensor([math.nan])) == Moments()
    assert Moments().std == 0.0


def test_travels_through_json() -> None:
    moments = Moments().updated(X)
    assert Moments(**json.loads(json.dumps(dataclasses.asdict(moments)))) == moments


def test_large_mean_keeps_its_digits() -> None:
    moments = Moments()
    for part in (1e6 + X.double()).split(2):
        moments = moments.updated(part)
    assert moments.std == pytest.approx(X.double().std(unbiased=False).item(), rel=1e-6)
