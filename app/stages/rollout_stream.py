"""From prompts to scored rollouts: batches in the engines as far ahead of the learner as the lag allows, scored as they end."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from app.data.prompt_stream import PromptStream
from app.experience import DoubleArray, FloatArray, Rollout, Scores
from app.interfaces import Pending, Reward, RolloutPool, Sampling, Scorer


@dataclass(frozen=True)
class ScoredRollouts:
    """One batch. reference: float32 [S-1] per rollout, log-probs of its whole sequence under the reference policy."""

    rollouts: list[Rollout]
    scores: Scores
    reference: list[FloatArray]


class RolloutStream:
    """Batch k is trained on at policy version k; the engines are given it as soon as version k - `max_lag` is in them."""

    def __init__(
        self,
        pool: RolloutPool,
        reward: Reward,
        scorer: Scorer,
        prompts: PromptStream,
        *,
        batch_size: int,
        samples: int,
        pieces: int,
        max_lag: int,
        seed: int,
        step: int,
        steps: int,
        cursor: int,
    ) -> None:
        """samples: responses to each prompt, which stand together in the batch; pieces: a batch goes to scoring in at most so many;
        step, cursor: batches and prompts that earlier starts have used."""
        self._pool, self._reward, self._scorer, self._prompts = pool, reward, scorer, prompts
        self.prompts_per_step, self._samples = batch_size // samples, samples
        self._batch_size, self._pieces, self._max_lag, self._seed = batch_size, pieces, max_lag, seed
        self._submitted, self._steps, self._cursor = step, steps, cursor
        self._in_flight: deque[Sampling] = deque()

    def fill(self, done: int) -> None:
        """Give the engines what may be sampled once `done` steps are trained and their weights published."""
        while self._submitted < min(done + self._max_lag + 1, self._steps):
            prompts = self._prompts.take(self._cursor, self.prompts_per_step, seed=self._seed)
            batch = [prompt for prompt in prompts for _ in range(self._samples)]
            self._in_flight.append(self._pool.submit(batch, seed=self._seed + self._cursor))
            self._cursor += self.prompts_per_step
            self._submitted += 1

    def take(self) -> PendingScores:
        """The next batch once all of its responses have ended; their scores and reference log-probs are under way."""
        sampling = self._in_flight.popleft()
        pending = PendingScores(sampling)
        waiting: set[int] = set()
        for places in sampling.finished():
            waiting |= set(places)
            if len(waiting) * self._pieces >= self._batch_size:
                self._send(pending, sampling, waiting)
                waiting = set()
        if waiting:
            self._send(pending, sampling, waiting)
        return pending

    def _send(self, pending: PendingScores, sampling: Sampling, ended: set[int]) -> None:
        places = sorted(ended)
        rollouts = [sampling[place] for place in places]
        reference = self._scorer.logprobs([rollout.sequence for rollout in rollouts])
        pending.pieces.append((places, self._reward.score(rollouts), reference))


class PendingScores:
    """`Pending` scores and reference log-probs of a batch whose responses have ended."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self.pieces: list[tuple[list[int], Pending[Scores], Pending[list[FloatArray]]]] = []

    @property
    def rollouts(self) -> list[Rollout]:
        """In the order of the prompts."""
        return self._sampling.result()

    def result(self) -> ScoredRollouts:
        """Everything, in the order of the prompts. Raises ScoringError."""
        scores = [(places, piece.result()) for places, piece, _ in self.pieces]
        reference = {place: row for places, _, piece in self.pieces for place, row in zip(places, piece.result(), strict=True)}
        return ScoredRollouts(self.rollouts, joined(scores), [reference[place] for place in sorted(reference)])


def joined(pieces: Sequence[tuple[Sequence[int], Scores]]) -> Scores:
    """The scores of a batch from those of its pieces, each given with its places in the batch."""
    order = np.argsort([place for places, _ in pieces for place in places])

    def join(rows: Sequence[DoubleArray]) -> DoubleArray:
        return np.concatenate(rows)[order]

    scores = [piece for _, piece in pieces]
    disagreements = [piece.disagreement_B for piece in scores if piece.disagreement_B is not None]
    return Scores(
        total_B=join([piece.total_B for piece in scores]),
        parts={name: join([piece.parts[name] for piece in scores]) for name in scores[0].parts},
        held_out=scores[0].held_out,
        disagreement_B=join(disagreements) if disagreements else None,
        failures={name: reason for piece in reversed(scores) for name, reason in piece.failures.items()},
    )
