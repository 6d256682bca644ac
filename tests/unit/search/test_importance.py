"""The importance of searched keys: against hand-made searches whose answer is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.search.importance import Importance, describe, importances, ranks
from app.search.results import Search, Trial


def search(configs: Sequence[Mapping[str, Any]], objectives: Sequence[float | None], statuses: Sequence[str] | None = None) -> Search:
    ends = statuses or ["finished"] * len(configs)
    trials = [Trial(str(i), c, end, 4, o) for i, (c, o, end) in enumerate(zip(configs, objectives, ends, strict=True))]
    return Search(Path(), tuple(trials), None)


def test_an_optimum_in_the_middle_counts_and_noise_does_not() -> None:
    rng = np.random.default_rng(0)
    configs = [{"lr": float(lr), "noise": float(rng.random())} for lr in np.linspace(0, 1, 24)]
    found = {one.key: one for one in importances(search(configs, [-((c["lr"] - 0.5) ** 2) for c in configs]))}
    assert found["lr"].share is not None and found["lr"].share > 0.8
    assert found["lr"].certain
    assert not found["noise"].certain


def test_the_share_is_the_adjusted_r_squared() -> None:
    """Ranks 0 1 2 3 at levels a a b b: means 0.5 and 2.5 explain 4 of 5, adjusted 1 - 0.2 * 3 / 2."""
    (one,) = importances(search([{"k": value} for value in "aabb"], [1.0, 2.0, 3.0, 4.0]))
    assert one.share == pytest.approx(0.7)
    assert one.trials == 4


def test_chance_reaches_its_mark_in_one_of_twenty_searches() -> None:
    rng = np.random.default_rng(1)
    configs = [{f"k{i}": float(rng.random()) for i in range(300)} for _ in range(12)]
    found = importances(search(configs, [float(rng.random()) for _ in configs]))
    assert 0.02 < np.mean([one.certain for one in found]) < 0.09


@pytest.mark.parametrize("untried", ["failed", "refused"])
def test_what_broke_ranks_lowest_and_what_was_not_tried_is_left_out(untried: str) -> None:
    configs = [{"lr": value} for value in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)]
    ends = ["finished"] * 4 + ["diverged"] * 3 + [untried]
    (one,) = importances(search(configs, [4.0, 3.0, 2.0, 1.0, 99.0, None, None, 99.0], ends))
    assert one.trials == 7
    assert one.share is not None and one.share > 0.9


def test_a_conditional_key_is_judged_by_the_trials_that_have_it() -> None:
    configs: list[dict[str, Any]] = [{"algorithm": "grpo"}] * 3 + [{"algorithm": "ppo", "lambda": 0.1 * i} for i in range(6)]
    found = {one.key: one.trials for one in importances(search(configs, [float(i) for i in range(9)]))}
    assert found == {"algorithm": 9, "lambda": 6}


@pytest.mark.parametrize("objectives", [[1.0], [1.0, 2.0], [1.0, 1.0, 1.0, 1.0, 1.0], [None, None, None]])
def test_too_little_says_nothing(objectives: list[float | None]) -> None:
    (one,) = importances(search([{"lr": float(i)} for i in range(len(objectives))], objectives))
    assert (one.share, one.chance, one.certain) == (None, None, False)


def test_one_value_says_nothing() -> None:
    assert importances(search([{"lr": 1.0}] * 5, [1.0, 2.0, 3.0, 4.0, 5.0])) == [Importance("lr", 5)]


def test_descriptions() -> None:
    assert describe(["a", "a"]).shape == (2, 0)
    assert describe([1, 2, 2]).shape == (3, 1)
    assert describe([1, 2, 4]).shape == (3, 2)
    assert describe([True, False, True]).shape == (3, 1)
    assert describe(["a", [1], "b"]).shape == (3, 2)
    np.testing.assert_allclose(describe([0.1, 3.0, 2.0]).sum(0), 0, atol=1e-12)
    assert ranks([5.0, 5.0, -np.inf]).tolist() == [1.5, 1.5, 0.0]
