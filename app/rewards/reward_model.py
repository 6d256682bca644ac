"""The learned reward: what the scoring service's reward model says about prompt and response."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from app.errors import ScoringError
from app.experience import IntArray, Rollout
from app.interfaces import Pending, Scorer


@dataclass(frozen=True)
class RewardModelReward:
    """Scores every rollout's token ids, never re-tokenised text, by a `Scorer`."""

    scorer: Scorer

    def score(self, rollouts: Sequence[Rollout]) -> Pending[list[float]]:
        """Start scoring; one float per rollout, in order, NaN where its score failed."""
        sequences = [rollout.sequence for rollout in rollouts]
        return _PendingScores(self.scorer, sequences, self.scorer.scores(sequences))


@dataclass(frozen=True)
class _PendingScores:
    scorer: Scorer
    sequences: list[IntArray]
    batch: Pending[list[float]]

    def result(self) -> list[float]:
        """The scores. A request for all that fails is split into one per rollout, so that one bad rollout costs only
        its own score. Raises ScoringError when every single one fails too: that is the service, not a rollout."""
        try:
            scores = self.batch.result()
        except ScoringError as error:
            scores = self._one_by_one(error)
        return [score if math.isfinite(score) else math.nan for score in scores]

    def _one_by_one(self, cause: ScoringError) -> list[float]:
        requests = [self.scorer.scores([sequence]) for sequence in self.sequences]
        scores, failures = [], 0
        for request in requests:
            try:
                scores += request.result()
            except ScoringError:
                scores.append(math.nan)
                failures += 1
        if failures == len(requests):
            raise cause
        return scores
