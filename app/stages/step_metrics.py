"""What one PPO step is like, beside what the algorithm says about its credit and its update.

Shape legend: B rollouts, T response tokens.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from app.algorithms.algorithm import Algorithm
from app.algorithms.credit import credit_metrics
from app.experience import Experience, FinishReason, Minibatch, PolicyOutputs, Rollout, Scores, Totals
from app.numerics.kl import k3
from app.numerics.masked import masked_mean
from app.rewards.mix import score_metrics
from app.rewards.repetition import repeated_share

REPETITION_NGRAM = 4


def batch_metrics(
    algorithm: Algorithm[Any], rollouts: Sequence[Rollout], scores: Scores, credited: Experience, *, version: int
) -> dict[str, float]:
    """Everything that is known of a batch before the update, from what `app.kept_rollouts` records."""
    return {
        **step_metrics(rollouts, scores, credited, version),
        **credit_metrics(credited),
        **starting_losses(algorithm, credited),
    }


def step_metrics(rollouts: Sequence[Rollout], scores: Scores, experience: Experience, version: int) -> dict[str, float]:
    """A batch before the update. experience: credited; version: that of the learner's weights.

    score_mean, score_std: of the scores that did not fail, before shaping. finished_share: responses that ended before the token
    limit. repetition_share: mean share of a response's 4-grams that occurred in it before. staleness: versions by which the oldest
    rollout is behind. logprob_mismatch_k3: mean over tokens of the k3 estimate of KL(engine, learner), nats. masked_rows: share of
    rollouts without any token to learn from. And those of `score_metrics`.
    """
    scored_B = scores.total_B[~np.isnan(scores.total_B)]
    mask_BT = experience.mask_BT
    return {
        "score_mean": float(scored_B.mean()),
        "score_std": float(scored_B.std()),
        "finished_share": sum(rollout.finish is FinishReason.STOP for rollout in rollouts) / len(rollouts),
        "repetition_share": float(np.mean([repeated_share(rollout.ids, REPETITION_NGRAM) for rollout in rollouts])),
        "staleness": float(version - min(rollout.policy_version for rollout in rollouts)),
        "logprob_mismatch_k3": float(masked_mean(k3(experience.behaviour_BT, experience.proximal_BT), mask_BT)),
        "masked_rows": 1 - float(mask_BT.any(dim=1).float().mean()),
        **score_metrics(scores),
    }


def starting_losses(algorithm: Algorithm[Any], experience: Experience) -> dict[str, float]:
    """`start/policy_loss` and `start/value_loss`: the losses of a credited batch before the first optimizer step, where the current
    policy and critic are those that gave the proximal log-probs and the values."""
    mask_BT = experience.mask_BT
    minibatch = Minibatch.from_rows(experience, torch.arange(len(mask_BT)))
    totals = Totals(tokens=int(mask_BT.sum()), sequences=int(mask_BT.any(dim=1).sum()))
    outputs = PolicyOutputs(minibatch.proximal_BT, minibatch.old_values_BT, torch.zeros_like(minibatch.proximal_BT))
    metrics = algorithm.loss(outputs, minibatch, totals).metrics
    return {f"start/{name}": metrics[name] for name in ("policy_loss", "value_loss") if name in metrics}


class PhaseClock:
    """Seconds spent in each named phase of one step, and since its start."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._began = time.perf_counter()

    @property
    def total(self) -> float:
        return time.perf_counter() - self._began

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - began


def time_metrics(rollouts: Sequence[Rollout], clock: PhaseClock) -> dict[str, float]:
    """How fast the step was, in response tokens, and where its time went."""
    total = clock.total
    return {
        "tokens_per_second": sum(len(rollout.ids) for rollout in rollouts) / total,
        "seconds": total,
        "push/seconds_share": clock.seconds["push"] / total,
        **{f"seconds/{phase}": spent for phase, spent in clock.seconds.items()},
    }
