"""What a PPO step has to pass: how old its rollouts are, whether engine and learner agree, scores, finite numbers, alarms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from app.alarms import AlarmWatch, require_finite
from app.config.ppo import PpoConfig
from app.errors import NonFiniteError, RolloutError, ScoringError, StaleRolloutError
from app.experience import Experience, Rollout
from app.interfaces import Tracker


def check_lag(rollouts: Sequence[Rollout], version: int, max_lag: int) -> None:
    """Raises StaleRolloutError when a rollout is older than the run allows."""
    oldest = min(rollout.policy_version for rollout in rollouts)
    if version - oldest > max_lag:
        raise StaleRolloutError(
            f"a rollout was sampled by policy version {oldest}, the learner is at {version}: more than ppo.max_lag = {max_lag}"
        )


def require_agreement(experience: Experience, config: PpoConfig) -> None:
    """At lag 0 engine and learner hold the same weights, so their log-probs must agree on every sampled token. Raises RolloutError,
    and at any lag NonFiniteError for log-probs of the learner's that are no numbers."""
    if not experience.proximal_BT.isfinite().all():
        raise NonFiniteError("the policy's log-probs of sampled tokens are not finite: lower ppo.policy.lr and begin in another run.dir")
    if config.max_lag:
        return
    mismatch = float((experience.proximal_BT - experience.behaviour_BT).abs().max())
    if not mismatch <= config.max_logprob_mismatch:
        raise RolloutError(
            f"the rollout engine's log-probs differ from the learner's by {mismatch:.2e} nats on sampled tokens (limit "
            f"ppo.max_logprob_mismatch = {config.max_logprob_mismatch:.0e}): temperature, precision or weights differ between the two"
        )


def require_scores(note: str | None, shaped_B: torch.Tensor, config: PpoConfig) -> None:
    """A failed score (NaN, its own or that of the reference answer) is masked out of the update; more than a few of them are no
    accident. note: why they failed. Raises ScoringError."""
    failed, count = int(shaped_B.isnan().sum()), len(shaped_B)
    if failed > config.max_failed_scores * count:
        raise ScoringError(
            f"{failed} of {count} scores failed, more than ppo.max_failed_scores = {config.max_failed_scores:g} allows ({note}): "
            "mend that, or look at the logs in the run folder"
        )


def require_finite_batch(tracker: Tracker, step: int, metrics: Mapping[str, float]) -> None:
    """Raises NonFiniteError before the update, with the metrics logged."""
    try:
        require_finite(metrics)
    except NonFiniteError:
        tracker.log("ppo", step, metrics)
        raise


def sound_alarms(tracker: Tracker, watch: AlarmWatch, step: int, metrics: Mapping[str, float]) -> None:
    """Tell the alarms that begin with this step. Raises NonFiniteError, and AlarmError for the first alarm that is set to stop the run."""
    # An infinite gradient norm is how fp16's loss scaling tells that it skipped a step; elsewhere the learner has raised.
    require_finite({name: value for name, value in metrics.items() if not (name.endswith("grad_norm") and value == math.inf)})
    begun = watch.look(metrics)
    for alarm in begun:
        tracker.event("ppo", step, alarm.text)
    for alarm in begun:
        if alarm.action == "stop":
            raise alarm.error()
