"""Alarms are a function of the metrics: limits, patience, directions, and reward hacking."""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from app.alarms import REMEDIES, AlarmWatch, alarms, require_finite, reward_hacking
from app.config.alarms import AlarmsConfig
from app.errors import AlarmError, NonFiniteError


def configured(**rules: Mapping[str, Any]) -> AlarmsConfig:
    return AlarmsConfig.model_validate(rules)


def test_every_alarm_has_a_remedy() -> None:
    assert REMEDIES.keys() == AlarmsConfig.model_fields.keys()


@pytest.mark.parametrize(
    ("metric", "rule", "values", "fires"),
    [
        ("kl", {"limit": 10}, [11], True),
        ("kl", {"limit": 10}, [10], False),
        ("kl", {"limit": 10, "action": "off"}, [11], False),
        ("entropy", {"limit": 0.1, "patience": 1}, [0.05], True),
        ("entropy", {"limit": 0.1, "patience": 1}, [0.2], False),
        ("entropy", {"limit": 0.1}, [0.05] * 2, False),  # patience as by default
        ("entropy", {"limit": 0.1}, [0.05] * 3, True),
        ("clip_fraction", {"limit": 0.5, "patience": 3}, [0.6, 0.7, 0.6], True),
        ("clip_fraction", {"limit": 0.5, "patience": 3}, [0.6, 0.4, 0.6], False),
        ("clip_fraction", {"limit": 0.5, "patience": 3}, [0.6, 0.6], False),
        ("clip_fraction", {"limit": 0.5, "patience": 3}, [0.6, None, 0.6, 0.6], False),
        ("reward_hacking", {"limit": 3}, [3.5], True),
    ],
)
def test_limits(metric: str, rule: dict[str, Any], values: list[float | None], fires: bool) -> None:
    history = [{} if value is None else {metric: value} for value in values]
    found = alarms(history, configured(**{metric: rule}))
    assert [alarm.metric for alarm in found] == [metric] * fires
    if fires:
        assert found[0].text == str(found[0].error())
        assert all(part in found[0].text for part in (metric, f"limit alarms.{metric}.limit = {rule['limit']}", REMEDIES[metric]))


def test_a_healthy_step_is_quiet() -> None:
    step = {
        "logprob_mismatch": 1e-6,
        "first_step_mismatch": 0.0,
        "clip_fraction": 0.02,
        "explained_variance": -0.2,
        "kl": 2.0,
        "entropy": 0.7,
    }
    assert alarms([step] * 20, AlarmsConfig()) == []


def test_an_occurrence_is_told_once_until_it_has_cleared() -> None:
    watch = AlarmWatch(configured(kl={"limit": 1}))
    told = [len(watch.look({"kl": kl})) for kl in (0.0, 2.0, 3.0, 0.5, 2.0)]
    assert told == [0, 1, 0, 0, 1]


def test_a_resumed_run_does_not_tell_again_what_was_told_before() -> None:
    rules = configured(kl={"limit": 1}, entropy={"limit": 1, "patience": 2, "action": "stop"})
    watch = AlarmWatch(rules, [{"kl": 2.0, "entropy": 0.5}])
    assert [alarm.metric for alarm in watch.look({"kl": 2.0, "entropy": 0.5})] == ["entropy"]


def test_reward_hacking_needs_both_movements_and_a_whole_window() -> None:
    rng = np.random.default_rng(0)

    def run(trained: float, held_out: float, steps: int = 20) -> float | None:
        noise = rng.normal(size=(steps, 2)) * 0.3
        return reward_hacking(
            [{"score_mean": trained * i + a, "holdout_score": held_out * i + b} for i, (a, b) in enumerate(noise)], window=20
        )

    hacked = run(0.1, -0.1)
    assert hacked is not None and hacked > 4
    for healthy in (run(0.1, 0.1), run(0.1, 0.0), run(-0.1, -0.1)):
        assert healthy is not None and healthy < 4
    assert run(0.1, -0.1, steps=19) is None
    assert reward_hacking([{"score_mean": 1.0}] * 20, window=20) is None
    assert reward_hacking([{"score_mean": 0.0, "holdout_score": 0.0}] * 20, window=20) == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_named(value: float) -> None:
    require_finite({"loss": 1.0})
    with pytest.raises(NonFiniteError, match=f"metric entropy is {value}"):
        require_finite({"loss": 1.0, "entropy": value})


def test_the_error_travels_between_processes() -> None:
    error = AlarmError("kl", 12.0, 10.0, "raise ppo.kl.coef")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.metric, again.exit_code) == (str(error), "kl", 1)
