"""The whole reward: named parts, scored at the same time and combined into one number per rollout.

Shape legend: B rollouts, M models of an ensemble, K trained parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from app.experience import DoubleArray, FinishReason, IntArray, Rollout, Scores
from app.interfaces import Pending, Scorer
from app.rewards.part import Failed, RulePart, Sample
from app.rewards.reward_model import RewardModelReward

Combine = Literal["sum", "mean", "min"]


class Source(Protocol):
    """Where one list of scores comes from: a reward model, a rule."""

    def score(self, rollouts: Sequence[Rollout]) -> Pending[Sequence[float | Failed]]: ...


@dataclass(frozen=True)
class Part:
    """One named part. sources: more than one are an ensemble, whose score is their mean or their minimum."""

    name: str
    sources: tuple[Source, ...]
    combine: Literal["mean", "min"] = "mean"
    weight: float = 1.0
    hold_out: bool = False


@dataclass(frozen=True)
class RewardMix:
    """`app.interfaces.Reward` over parts. The score of a rollout fails as soon as that of one trained part does; a failed score of
    a held-out part costs nothing but that score."""

    parts: tuple[Part, ...]
    combine: Combine = "sum"

    def score(self, rollouts: Sequence[Rollout]) -> Pending[Scores]:
        """Start every part."""
        return _PendingMix(self, [[source.score(rollouts) for source in part.sources] for part in self.parts])


@dataclass(frozen=True)
class _PendingMix:
    mix: RewardMix
    pending: list[list[Pending[Sequence[float | Failed]]]]

    def result(self) -> Scores:
        parts: dict[str, DoubleArray] = {}
        failures: dict[str, str] = {}
        disagreements: list[DoubleArray] = []
        for part, pending in zip(self.mix.parts, self.pending, strict=True):
            answers = [source.result() for source in pending]
            reasons = [reason for row in answers for answer in row if (reason := _why_failed(answer))]
            if reasons:
                failures[part.name] = reasons[0]
            scores_MB = np.array([[math.nan if isinstance(answer, Failed) else answer for answer in row] for row in answers])
            scores_MB[~np.isfinite(scores_MB)] = math.nan
            parts[part.name] = scores_MB.min(0) if part.combine == "min" else scores_MB.mean(0)
            if len(scores_MB) > 1:
                disagreements.append(scores_MB.std(0))
        trained = [part for part in self.mix.parts if not part.hold_out]
        return Scores(
            total_B=combined(np.stack([parts[part.name] for part in trained]), [part.weight for part in trained], self.mix.combine),
            parts=parts,
            held_out=frozenset(part.name for part in self.mix.parts if part.hold_out),
            disagreement_B=np.max(disagreements, axis=0) if disagreements else None,
            failures=failures,
        )


def _why_failed(answer: float | Failed) -> str | None:
    if isinstance(answer, Failed):
        return answer.reason
    return None if math.isfinite(answer) else f"the score is {answer}"


def combined(scores_KB: DoubleArray, weights: Sequence[float], how: Combine) -> DoubleArray:
    """Parts [K, B] as one score per rollout [B]: sum of weight x score; the same over the sum of weights; the smallest
    weight x score. NaN in any part is NaN in the result.

    >>> scores = np.array([[1.0, 2.0], [3.0, np.nan]])
    >>> combined(scores, [1.0, 0.5], "sum"), combined(scores, [1.0, 0.5], "mean"), combined(scores, [1.0, 0.5], "min")
    (array([2.5, nan]), array([1.66666667,        nan]), array([ 1., nan]))
    """
    weighted_KB = scores_KB * np.asarray(weights)[:, None]
    if how == "min":
        return np.asarray(weighted_KB.min(0))
    total_B = weighted_KB.sum(0)
    return np.asarray(total_B / sum(weights) if how == "mean" else total_B)


@dataclass(frozen=True)
class RuleSource:
    """A rule over rollouts. decode: response ids -> text; run: scores the samples, here or in another process."""

    rule: RulePart
    decode: Callable[[IntArray], str]
    run: Callable[[Sequence[Sample]], Pending[Sequence[float | Failed]]] | None = None

    def score(self, rollouts: Sequence[Rollout]) -> Pending[Sequence[float | Failed]]:
        """Start the rule; without `run` it is done at once, in this process."""
        samples = [Sample(r.prompt.messages, self.decode(r.ids), r.ids, r.finish is FinishReason.STOP) for r in rollouts]
        return self.run(samples) if self.run else _Done(self.rule.score(samples))


@dataclass(frozen=True)
class _Done:
    value: Sequence[float | Failed]

    def result(self) -> Sequence[float | Failed]:
        return self.value


def one_reward_model(scorer: Scorer) -> RewardMix:
    """The plain case: nothing but the service's reward model."""
    return RewardMix((Part("reward_model", (RewardModelReward(scorer),)),))


def score_metrics(scores: Scores) -> dict[str, float]:
    """`reward/NAME`: mean of each part, `reward_failed/NAME`: share of its scores that failed; `holdout_score`: mean over the held-out
    parts; `reward_disagreement`: mean standard deviation within ensembles. Failed scores are left out; a part without any has no mean."""
    metrics: dict[str, float] = {}
    for name, scores_B in scores.parts.items():
        good = scores_B[~np.isnan(scores_B)]
        metrics[f"reward_failed/{name}"] = 1 - len(good) / len(scores_B)
        if len(good):
            metrics[f"reward/{name}"] = float(good.mean())
    held_out = [metrics[f"reward/{name}"] for name in sorted(scores.held_out) if f"reward/{name}" in metrics]
    if held_out:
        metrics["holdout_score"] = float(np.mean(held_out))
    if scores.disagreement_B is not None and not np.isnan(scores.disagreement_B).all():
        metrics["reward_disagreement"] = float(np.nanmean(scores.disagreement_B))
    return metrics


def failure_note(scores: Scores, references: Scores | None = None) -> str | None:
    """Why scores of a batch failed, in one line: of each part how many did, and the first reason; None where none did.

    references: scores of the reference answers, where they were asked for.

    >>> scores = Scores(np.array([1.0, np.nan]), {"judge": np.array([1.0, np.nan])}, failures={"judge": "no answer"})
    >>> failure_note(scores)
    '1 of 2 scores of the reward judge failed (no answer)'
    """
    kinds = [("scores", scores)] + ([("scores of reference answers", references)] if references is not None else [])
    notes = [
        f"{int(np.isnan(found.parts[name]).sum())} of {len(found.parts[name])} {kind} of the reward {name} failed ({reason})"
        for kind, found in kinds
        for name, reason in found.failures.items()
    ]
    return "; ".join(notes) or None
