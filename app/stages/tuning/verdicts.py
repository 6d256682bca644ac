"""What a trial is worth after each of its steps, and whether it is to be stopped and marked. Knows no Ray."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.config.tune import BY_ANSWERS, TuneConfig
from app.errors import AlarmError
from app.search.records import HELD, OVER_BUDGET, Status

KEPT = ("score_mean", "score_std", "holdout_score", "kl", "entropy", "response_length")
"""Metrics of a step that verdicts and curves read."""
COLLAPSE_ALARMS = ("entropy", "response_length")
MARKED_DEVIATIONS = 10.0
LOWEST_TARGET = -1e6


@dataclass(frozen=True)
class Mark:
    """Why a trial is stopped: its own configuration brought it there."""

    status: Status
    why: str

    @classmethod
    def of_alarm(cls, error: AlarmError) -> Mark:
        return cls("collapsed" if error.metric in COLLAPSE_ALARMS else "diverged", str(error))


class Judge:
    """Follows one trial. steps: what `kept` returned in an earlier life of the trial, oldest first."""

    def __init__(self, config: TuneConfig, steps: Iterable[Mapping[str, Any]] = ()) -> None:
        self._config = config
        self._steps = [dict(step) for step in steps]

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics of a PPO step. The last evaluation stands until there is another."""
        stands: dict[str, Any] = {
            name: self._steps[-1][name] for name in ("eval_score", "eval_kl") if self._steps and name in self._steps[-1]
        }
        self._steps.append({"step": step, **stands, **{name: float(metrics[name]) for name in KEPT if name in metrics}})

    def add_evaluation(self, score: float, kl: float) -> None:
        """The mean score of answers to held-out prompts after the last step, and their mean KL per sequence."""
        self._steps[-1] |= {"eval_score": score, "eval_kl": kl}

    def evaluation_due(self, step: int, last: int) -> bool:
        """Whether the objective asks for held-out answers after this step of `last`."""
        return self._config.objective in BY_ANSWERS and (step in (1, last) or step % self._config.eval_every == 0)

    @property
    def kept(self) -> list[dict[str, Any]]:
        """Everything this judge knows, JSON-able as long as it is finite."""
        return [dict(step) for step in self._steps]

    def mark(self) -> Mark | None:
        """What is wrong with the trial after its last step, or None."""
        config, first = self._config, self._steps[0]
        kl, score, length = (self._recent(name) for name in ("kl", "score_mean", "response_length"))
        if not all(map(math.isfinite, (kl, score, length, self.objective))):
            return Mark("non-finite", f"score {score:g}, KL {kl:g}, objective {self.objective:g}")
        if config.kl_budget is not None and kl > config.kl_budget:
            return Mark(OVER_BUDGET, f"KL {kl:.3g} nats, tune.kl_budget = {config.kl_budget:g}")
        lowest = first["score_mean"] - (config.divergence or math.inf) * first["score_std"]
        if config.divergence is not None and score < lowest:
            return Mark(
                "diverged", f"score {score:.3g}, first batch {first['score_mean']:.3g}: tune.divergence = {config.divergence:g} deviations"
            )
        if config.collapse is not None and length < config.collapse * first["response_length"]:
            return Mark(
                "collapsed",
                f"{length:.3g} tokens per response, first batch {first['response_length']:.3g}: tune.collapse = {config.collapse:g}",
            )
        return None

    @property
    def score(self) -> float:
        """What the objective calls a score, NaN where there is none yet."""
        config = self._config
        if config.objective in BY_ANSWERS:
            return float(self._steps[-1].get("eval_score", math.nan))
        return self._recent("holdout_score" if config.objective == "hold_out" else "score_mean")

    @property
    def kl(self) -> float:
        """Nats per sequence, of what the score is of."""
        evaluated = self._config.objective in BY_ANSWERS
        return float(self._steps[-1].get("eval_kl", math.nan)) if evaluated else self._recent("kl")

    @property
    def objective(self) -> float:
        return self.score - self._config.kl_price * self.kl

    def result(self, mark: Mark | None = None) -> dict[str, Any]:
        """The last step as Tune hears of it. `target` is what searcher and scheduler compare: the objective, or for a marked trial less
        than any that held is likely to have, in the scale of the scores; `target_score` and `target_kl` are for a search by both."""
        if not self._steps:
            return (
                {"step": 0, "objective": math.nan, "score": math.nan, "mean_kl": math.nan}
                | {"target": LOWEST_TARGET, "target_score": LOWEST_TARGET, "target_kl": -LOWEST_TARGET}
                | dict.fromkeys(KEPT, math.nan)
                | _marked(mark)
            )
        last = self._steps[-1]
        shown = {name: last.get(name, math.nan) for name in KEPT}
        targets = {"target": self.objective, "target_score": self.score, "target_kl": self.kl}
        if mark is not None:
            lowest = self._target_of_marked()
            targets = {"target": lowest, "target_score": lowest, "target_kl": self._highest_kl()}
        return {
            "step": last["step"],
            "objective": self.objective,
            "score": self.score,
            **targets,
            **shown,
            "mean_kl": self.kl,
        } | _marked(mark)

    def _target_of_marked(self) -> float:
        first = self._steps[0]
        floor = first["score_mean"] - MARKED_DEVIATIONS * first["score_std"]
        known = [value for value in (floor, self.objective) if math.isfinite(value)]
        return min(known, default=LOWEST_TARGET)

    def _highest_kl(self) -> float:
        known = [step[name] for step in self._steps for name in ("kl", "eval_kl") if math.isfinite(step.get(name, math.nan))]
        return max(known, default=-LOWEST_TARGET)

    def _recent(self, name: str) -> float:
        return mean([step.get(name, math.nan) for step in self._steps[-self._config.window :]])


def _marked(mark: Mark | None) -> dict[str, str]:
    return {} if mark is None else {"status": mark.status, "why": mark.why}


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def best_row(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The row of the highest objective among the trials that came to their last step, or where none did, among those that were stopped
    early; None where no trial held."""
    for status in HELD:
        held = [row for row in rows if row["status"] == status and row["objective"] is not None and math.isfinite(row["objective"])]
        if held:
            return max(held, key=lambda row: float(row["objective"]))
    return None
