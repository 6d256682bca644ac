"""Shaping of scores: order of the steps by hand, running scales, and options that contradict each other."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from app.algorithms.shaping import RewardShapingConfig, scale_of, shape_scores
from app.numerics import Moments


def shape(
    config: RewardShapingConfig,
    scores: list[float],
    moments: Moments | None = None,
    baselines: list[float | None] | None = None,
    finished: list[bool] | None = None,
    lengths: list[int] | None = None,
) -> tuple[list[float], Moments]:
    known = baselines or [None] * len(scores)
    shaped_B, moments = shape_scores(
        torch.tensor(scores),
        config,
        moments or Moments(),
        baselines_B=torch.tensor([0.0 if known is None else known for known in known]),
        has_baseline_B=torch.tensor([known is not None for known in known]),
        finished_B=torch.tensor(finished or [True] * len(scores)),
        lengths_B=torch.tensor(lengths or [1] * len(scores)),
        max_length=10,
    )
    return shaped_B.tolist(), moments


def test_every_step_in_order() -> None:
    # Row 0: 9 - 1 = 8, / 2 = 4, clipped to 3, finished, - 0.1 * 4 tokens = 2.6.
    # Row 1: 5 (no reference answer), / 2 = 2.5, no end token: -1, - 0.1 * 10 - 0.5 (overlong, at the limit) = -2.5.
    # Row 2: -4 - 2 = -6, / 2 = -3, no end token, but lower than -1 as it is; 8 tokens: - 0.8 - 0.5 * 2 / 4 = -4.05.
    config = RewardShapingConfig(
        delta=True,
        scale="reference",
        reference_std=2.0,
        clip=3.0,
        missing_eos_score=-1.0,
        length_penalty=0.1,
        overlong_buffer=4,
        overlong_penalty=0.5,
    )
    shaped, _ = shape(config, [9.0, 5.0, -4.0], baselines=[1.0, None, 2.0], finished=[True, False, False], lengths=[4, 10, 8])
    assert shaped == pytest.approx([2.6, -2.5, -4.05])


def test_defaults_only_replace_the_score_of_an_answer_without_end() -> None:
    shaped, _ = shape(
        RewardShapingConfig(), [7.0, 7.0, -3.0], baselines=[1.0, 1.0, 1.0], finished=[True, False, False], lengths=[9, 10, 10]
    )
    assert shaped == [7.0, -1.0, -3.0]


def test_penalty_instead_of_replacement() -> None:
    config = RewardShapingConfig(missing_eos_score=None, missing_eos_penalty=2.0)
    assert shape(config, [7.0, 7.0], finished=[True, False])[0] == [7.0, 5.0]


def test_failed_scores_stay_failed_and_out_of_the_moments() -> None:
    config = RewardShapingConfig(delta=True, scale="running", clip=3.0, length_penalty=0.1, overlong_buffer=2)
    shaped, moments = shape(config, [math.nan, 3.0, 1.0, 9.0], baselines=[0.0, None, None, math.nan], finished=[False, True, True, False])
    assert math.isnan(shaped[0]) and math.isnan(shaped[3])  # also where the reference answer has no score
    assert (moments.count, moments.mean, moments.std) == (2, 2.0, 1.0)


def test_running_scale_is_that_of_all_scores_so_far_and_of_the_unscaled_ones() -> None:
    config = RewardShapingConfig(scale="running")
    first, moments = shape(config, [2.0, -2.0])  # deviation 2
    assert first == [1.0, -1.0]
    second, moments = shape(config, [4.0, 4.0], moments)  # of 2, -2, 4, 4: mean 2, deviation sqrt(24 / 4)
    assert second == pytest.approx([4 / math.sqrt(6)] * 2)
    assert moments.count == 4


def test_reference_scale_is_that_of_the_first_batch() -> None:
    config = RewardShapingConfig(scale="reference")
    first, moments = shape(config, [2.0, -2.0])
    second, after = shape(config, [4.0, 40.0], moments)
    assert (first, second, after) == ([1.0, -1.0], [2.0, 20.0], moments)


def test_reference_scale_waits_for_scores_that_differ() -> None:
    """As of a rule that no response passes at first: without a deviation the whole run would go unscaled."""
    config = RewardShapingConfig(scale="reference")
    first, moments = shape(config, [0.0, 0.0])
    second, moments = shape(config, [0.0, 4.0], moments)  # of 0, 0, 0, 4: mean 1, deviation sqrt(12 / 4)
    third, after = shape(config, [8.0, 80.0], moments)
    assert first == [0.0, 0.0] and after == moments
    assert second == pytest.approx([0.0, 4 / math.sqrt(3)]) and third == pytest.approx([8 / math.sqrt(3), 80 / math.sqrt(3)])


def test_without_a_scale_nothing_is_kept() -> None:
    assert shape(RewardShapingConfig(), [2.0, -2.0]) == ([2.0, -2.0], Moments())


def test_mean_is_never_subtracted() -> None:
    assert shape(RewardShapingConfig(scale="running"), [10.0, 12.0])[0] == [10.0, 12.0]


@pytest.mark.parametrize("scale", ["running", "reference"])
def test_scores_that_are_all_alike_are_left_alone(scale: Any) -> None:
    config = RewardShapingConfig(scale=scale)
    shaped, moments = shape(config, [5.0, 5.0])
    assert shaped == [5.0, 5.0]
    assert scale_of(config, moments) == 1.0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"missing_eos_penalty": 1.0}, "set missing_eos_score = null"),
        ({"reference_std": 2.0}, "scale = reference only"),
        ({"reference_std": 2.0, "scale": "running"}, "scale = reference only"),
    ],
)
def test_contradictions(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardShapingConfig(**given)
