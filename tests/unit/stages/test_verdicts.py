"""What a trial is worth, and when it is stopped."""

from __future__ import annotations

import math
from typing import Any

import pytest

from app.config.tune import TuneConfig
from app.errors import AlarmError
from app.stages.tuning.verdicts import LOWEST_TARGET, Judge, Mark, best_row


def metrics(**changed: float) -> dict[str, float]:
    return {"score_mean": 1.0, "score_std": 0.5, "kl": 2.0, "entropy": 3.0, "response_length": 20.0, **changed}


def judged(config: TuneConfig, *steps: dict[str, float]) -> Judge:
    judge = Judge(config)
    for number, step in enumerate(steps, 1):
        judge.add(number, step)
    return judge


def test_the_objective_is_the_mean_of_the_last_steps_less_the_price_of_their_kl() -> None:
    judge = judged(TuneConfig(window=2, kl_price=0.1), metrics(score_mean=-9.0), metrics(kl=4.0), metrics(score_mean=3.0))
    assert judge.objective == pytest.approx((1 + 3) / 2 - 0.1 * (4 + 2) / 2)
    result = judge.result()
    assert result["step"] == 3 and result["target"] == result["objective"] and result["mean_kl"] == 3.0


@pytest.mark.parametrize(
    ("config", "last", "status", "why"),
    [
        ({"kl_budget": 5.0}, metrics(kl=6.0), "over KL budget", "tune.kl_budget = 5"),
        ({"divergence": 3.0}, metrics(score_mean=-0.6), "diverged", "tune.divergence = 3"),
        ({"collapse": 0.2}, metrics(response_length=3.0), "collapsed", "tune.collapse = 0.2"),
        ({}, metrics(score_mean=math.nan), "non-finite", "score nan"),
    ],
)
def test_marks(config: dict[str, Any], last: dict[str, float], status: str, why: str) -> None:
    judge = judged(TuneConfig(window=1, **config), metrics(), last)
    mark = judge.mark()
    assert mark is not None and mark.status == status and why in mark.why
    result = judge.result(mark)
    assert result["status"] == status and math.isfinite(result["target"])
    assert result["target"] <= 1.0 - 10 * 0.5  # lower than any trial that held is likely to come


def test_a_sound_trial_is_not_marked_and_a_limit_of_null_never_is() -> None:
    assert judged(TuneConfig(), metrics(), metrics()).mark() is None
    wild = metrics(score_mean=-99.0, response_length=1.0, kl=1e3)
    assert judged(TuneConfig(window=1, divergence=None, collapse=None), metrics(), wild).mark() is None


def test_one_bad_batch_in_the_window_is_no_broken_budget() -> None:
    assert judged(TuneConfig(window=3, kl_budget=5.0), metrics(), metrics(), metrics(kl=9.0)).mark() is None


def test_an_evaluation_stands_until_the_next() -> None:
    config = TuneConfig(objective="held_out", eval_every=4, kl_price=0.5)
    judge = judged(config, metrics())
    assert [step for step in range(1, 11) if judge.evaluation_due(step, 10)] == [1, 4, 8, 10]
    judge.add_evaluation(2.0, 1.0)
    judge.add(2, metrics(score_mean=7.0))
    assert judge.score == 2.0 and judge.objective == 1.5


def test_the_held_out_parts_of_the_reward_can_be_the_objective() -> None:
    assert judged(TuneConfig(objective="hold_out", window=1), metrics(holdout_score=0.25)).score == 0.25


def test_a_restored_judge_goes_on_as_if_nothing_had_happened() -> None:
    config = TuneConfig()
    steps = [metrics(score_mean=float(i)) for i in range(5)]
    whole, first = judged(config, *steps), judged(config, *steps[:3])
    restored = Judge(config, first.kept)
    for number in (4, 5):
        restored.add(number, steps[number - 1])
    assert restored.result() == whole.result()


def test_a_trial_that_measured_nothing_has_the_lowest_target() -> None:
    assert Judge(TuneConfig()).result(Mark("non-finite", "at once"))["target"] == LOWEST_TARGET


def test_alarms_that_stop_are_marks() -> None:
    assert Mark.of_alarm(AlarmError("response_length", 1.0, 2.0, "x")).status == "collapsed"
    assert Mark.of_alarm(AlarmError("clip_fraction", 0.9, 0.5, "x")).status == "diverged"


def test_the_best_is_the_highest_objective_of_those_that_came_to_the_end() -> None:
    rows = [
        {"trial": "hacked", "status": "over KL budget", "objective": 9.0},
        {"trial": "early", "status": "stopped early", "objective": 3.0},
        {"trial": "good", "status": "finished", "objective": 2.0},
        {"trial": "poor", "status": "finished", "objective": 1.0},
        {"trial": "lost", "status": "failed", "objective": None},
    ]
    best = best_row(rows)
    assert best is not None and best["trial"] == "good"
    early = best_row(rows[:2])
    assert early is not None and early["trial"] == "early"
    assert best_row(rows[:1]) is None
