"""The learned reward: what reward models of the scoring service say about prompt and response."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from app.errors import ScoringError, first_line
from app.experience import IntArray, Rollout
from app.interfaces import Pending, Scorer
from app.rewards.part import Failed, RewardPart
from app.schema import InputPath


class RewardModelPart(RewardPart):
    """The score of a reward model, or of an ensemble of them."""

    type: Literal["reward_model"]
    paths: tuple[InputPath, ...] = ()
    """Reward-model folders, all of the policy's vocabulary; more than one are an ensemble. Default: `reward.path`."""
    combine: Literal["mean", "min"] = "mean"
    """The ensemble's score: the mean of its models' scores, or the lowest."""


@dataclass(frozen=True)
class RewardModelReward:
    """Scores every rollout's token ids, never re-tokenised text, by a `Scorer`."""

    scorer: Scorer

    def score(self, rollouts: Sequence[Rollout]) -> Pending[list[float | Failed]]:
        """Start scoring; one score per rollout, in order."""
        sequences = [rollout.sequence for rollout in rollouts]
        return _PendingScores(self.scorer, sequences, self.scorer.scores(sequences))


@dataclass(frozen=True)
class _PendingScores:
    scorer: Scorer
    sequences: list[IntArray]
    batch: Pending[list[float]]

    def result(self) -> list[float | Failed]:
        """The scores. A request for all that fails is split into one per rollout, so that one bad rollout costs only its own score."""
        try:
            scores: list[float | Failed] = list(self.batch.result())
        except ScoringError as error:
            scores = self._one_by_one() if len(self.sequences) > 1 else [Failed(first_line(error))]
        return [score if isinstance(score, Failed) or math.isfinite(score) else Failed(f"the model gave {score}") for score in scores]

    def _one_by_one(self) -> list[float | Failed]:
        requests = [self.scorer.scores([sequence]) for sequence in self.sequences]
        scores: list[float | Failed] = []
        for request in requests:
            try:
                scores += request.result()
            except ScoringError as error:
                scores.append(Failed(first_line(error)))
        return scores
