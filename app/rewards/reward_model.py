"""The learned reward: what reward models of the scoring service say about prompt and response."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from app.errors import ModelError, ScoringError, ScoringTimeoutError, first_line
from app.experience import IntArray, Rollout
from app.interfaces import Pending, Scorer
from app.rewards.part import Failed, RewardPart
from app.schema import InputPath


class RewardModelPart(RewardPart):
    """The score of a reward model, or of an ensemble of them."""

    type: Literal["reward_model"]
    paths: tuple[InputPath, ...] = ()
    """Reward-model folders; more than one are an ensemble. Default: `reward.path`."""
    combine: Literal["mean", "min"] = "mean"
    """The ensemble's score: the mean of its models' scores, or the lowest."""


@dataclass(frozen=True)
class RewardModelReward:
    """Scores rollouts by a `Scorer`: every rollout's token ids, never re-tokenised text, unless its model has a tokenizer of its own.

    rewrite: what such a model reads of a rollout, int32 [s]; raises ModelError where it can read nothing."""

    scorer: Scorer
    rewrite: Callable[[Rollout], IntArray] | None = None

    def score(self, rollouts: Sequence[Rollout]) -> Pending[list[float | Failed]]:
        """Start scoring; one score per rollout, in order."""
        sequences = [self._sequence(rollout) for rollout in rollouts]
        readable = [sequence for sequence in sequences if not isinstance(sequence, Failed)]
        return _PendingScores(self.scorer, sequences, self.scorer.scores(readable) if readable else None)

    def _sequence(self, rollout: Rollout) -> IntArray | Failed:
        if self.rewrite is None:
            return rollout.sequence
        try:
            return self.rewrite(rollout)
        except ModelError as error:
            return Failed(first_line(error))


@dataclass(frozen=True)
class _PendingScores:
    scorer: Scorer
    sequences: list[IntArray | Failed]
    batch: Pending[list[float]] | None

    def result(self) -> list[float | Failed]:
        """The scores. A request for all that fails is split into one per rollout, so that one bad rollout costs only its own score. What
        had no answer in time is not: where nobody answers, each of them would wait as long again."""
        found = iter(self._answers())
        scores = [sequence if isinstance(sequence, Failed) else next(found) for sequence in self.sequences]
        return [score if isinstance(score, Failed) or math.isfinite(score) else Failed(f"the model gave {score}") for score in scores]

    def _answers(self) -> list[float | Failed]:
        """Of what was sent."""
        if self.batch is None:
            return []
        sent = [sequence for sequence in self.sequences if not isinstance(sequence, Failed)]
        try:
            return list(self.batch.result())
        except ScoringError as error:
            if isinstance(error, ScoringTimeoutError) or len(sent) == 1:
                return [Failed(first_line(error))] * len(sent)
        return self._one_by_one(sent)

    def _one_by_one(self, sent: Sequence[IntArray]) -> list[float | Failed]:
        requests = [self.scorer.scores([sequence]) for sequence in sent]
        scores: list[float | Failed] = []
        for request in requests:
            try:
                scores += request.result()
            except ScoringTimeoutError as error:
                return scores + [Failed(first_line(error))] * (len(sent) - len(scores))
            except ScoringError as error:
                scores.append(Failed(first_line(error)))
        return scores
