"""From a run's metrics to alarms: what is beyond its limit, and what to do about it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from app.config.alarms import Above, Action, AlarmsConfig, Below
from app.errors import AlarmError, NonFiniteError

REWARD_HACKING = "reward_hacking"
REMEDIES = {
    "logprob_mismatch": "make precision and temperature of engine and learner the same",
    "max_logprob_mismatch": "make precision and temperature of engine and learner the same, or lower ppo.max_lag",
    "logprob_mismatch_k3": "make precision and temperature of engine and learner the same, or lower ppo.max_lag",
    "first_step_mismatch": "the learner's two passes over one batch differ: look for dropout, or raise model.precision",
    "staleness": "lower ppo.max_lag",
    "clip_fraction": "lower ppo.policy.lr or ppo.epochs",
    "explained_variance": "raise ppo.critic.lr, or give the critic time before the policy moves (ppo.critic_warmup_steps)",
    "kl": "raise ppo.kl.coef or lower ppo.policy.lr",
    "kl_per_token": "raise ppo.kl.coef or lower ppo.policy.lr",
    "entropy": "the policy has collapsed onto one answer: raise ppo.kl.coef or lower ppo.policy.lr",
    "response_length": "answers have become empty: add a length part to the reward",
    "finished_share": "answers run into the token limit: raise rollout.max_new_tokens, or make ppo.reward.missing_eos_score lower",
    "repetition_share": "answers repeat themselves: add a repetition part to the reward, or raise ppo.kl.coef",
    "reward_disagreement": "the answers leave what the reward models know: use combine = 'min', or raise ppo.kl.coef",
    REWARD_HACKING: "the trained reward rises while the held-out one falls: end here, train the reward model further, or raise ppo.kl.coef",
    "failed_scores": "mend what the reward's failures in the run's events.jsonl name",
    "masked_rows": "few rollouts are learnt from: look at the reward's failures in the run's events.jsonl and at what masks rollouts",
}


@dataclass(frozen=True)
class Alarm:
    """A metric beyond its limit. text: one line that names metric, value, limit and remedy."""

    metric: str
    value: float
    limit: float
    action: Action

    @property
    def text(self) -> str:
        return str(self.error())

    def error(self) -> AlarmError:
        return AlarmError(self.metric, self.value, self.limit, REMEDIES[self.metric])


def alarms(history: Sequence[Mapping[str, float]], config: AlarmsConfig) -> list[Alarm]:
    """The alarms after the last of the steps whose metrics `history` holds, oldest first. A step that lacks a metric breaks its row
    of steps beyond the limit. `reward_hacking` is read like any other metric (see the function of that name)."""
    found = []
    for metric in type(config).model_fields:
        rule: Above | Below = getattr(config, metric)
        recent = [step.get(metric, math.nan) for step in history[-rule.patience :]]
        beyond = [value < rule.limit if isinstance(rule, Below) else value > rule.limit for value in recent]
        if rule.action != "off" and len(recent) == rule.patience and all(beyond):
            found.append(Alarm(metric, recent[-1], rule.limit, rule.action))
    return found


def reward_hacking(history: Sequence[Mapping[str, float]], window: int) -> float | None:
    """How surely the trained reward rises while the held-out one falls, over the last `window` steps: the smaller of the rise of
    `score_mean` and the fall of `holdout_score` from the earlier to the later half, each in standard errors (Welch's t).

    Negative where either goes the right way; None with fewer steps, or without a held-out part.

    >>> steps = [{"score_mean": i + 0.1 * (i % 2), "holdout_score": -0.5 * i} for i in range(4)]
    >>> round(reward_hacking(steps, 4), 2)
    2.57
    """
    pairs = [(step["score_mean"], step["holdout_score"]) for step in history[-window:] if "holdout_score" in step]
    if len(pairs) < window:
        return None
    trained, held_out = np.array(pairs).T
    return min(_rise(trained), -_rise(held_out))


def _rise(values: np.ndarray) -> float:
    """Welch's t of the later half over the earlier half; rounding errors count as spread, so that constants give 0."""
    half = len(values) // 2
    early, late = values[:half], values[-half:]
    floor = np.finfo(np.float64).eps * np.abs(values).max() + np.finfo(np.float64).tiny
    spread = math.sqrt((early.var(ddof=1) + late.var(ddof=1)) / half)
    return float((late.mean() - early.mean()) / max(spread, floor))


def require_finite(metrics: Mapping[str, float]) -> None:
    """Raises NonFiniteError that names the first metric that is NaN or infinite."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise NonFiniteError(
                f"metric {name} is {value}: lower the learning rate or raise model.precision, and look at the steps before"
            )


class AlarmWatch:
    """Follows a run. history: metrics of the steps before, oldest first, where an earlier session logged them."""

    def __init__(self, config: AlarmsConfig | None = None, history: Iterable[Mapping[str, float]] = ()) -> None:
        self._config = config or AlarmsConfig()
        rules = [getattr(self._config, metric) for metric in AlarmsConfig.model_fields]
        longest = max(self._config.reward_hacking.window, *(rule.patience for rule in rules))
        self._history: deque[Mapping[str, float]] = deque(history, maxlen=longest)
        self._firing = {alarm.metric for alarm in alarms(self.history, self._config)}

    @property
    def history(self) -> list[Mapping[str, float]]:
        """The metrics of the last steps, as far back as any alarm looks, oldest first."""
        return list(self._history)

    def drift(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Metrics of this step that follow from those before it: `reward_hacking`, where there is a held-out part."""
        value = reward_hacking([*self._history, metrics], self._config.reward_hacking.window)
        return {} if value is None else {REWARD_HACKING: value}

    def look(self, metrics: Mapping[str, float]) -> list[Alarm]:
        """Take a step's metrics and return the alarms that begin with it, and every alarm that stops."""
        self._history.append(metrics)
        firing = alarms(self.history, self._config)
        new = [alarm for alarm in firing if alarm.metric not in self._firing or alarm.action == "stop"]
        self._firing = {alarm.metric for alarm in firing}
        return new
