"""From prompts to scored rollouts: batches in the engines as far ahead of the learner as the lag allows, scored as they end."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from app.data.prompt_stream import PromptStream
from app.errors import CheckpointError
from app.experience import DoubleArray, FloatArray, Rollout, Scores
from app.interfaces import Pending, Reward, RolloutPool, Sampling, Scorer


@dataclass(frozen=True)
class ScoredRollouts:
    """One batch. reference: float32 [S-1] per rollout, log-probs of its whole sequence under the reference policy."""

    rollouts: list[Rollout]
    scores: Scores
    reference: list[FloatArray]


class Cohort:
    """The responses to prompts that the engines were given together; rows of one prompt stand side by side and are one group.

    positions: of its prompts in the stream; first: rows that the engines were given before it."""

    def __init__(self, sampling: Sampling, positions: Sequence[int], *, samples: int, first: int) -> None:
        self.sampling, self.first = sampling, first
        self._positions, self._samples = positions, samples
        self._left = set(range(len(positions)))  # groups that no batch has
        self._ended: set[int] = set()  # places among them
        self._finished = sampling.finished()

    def __len__(self) -> int:
        """Groups that no batch has."""
        return len(self._left)

    @property
    def left(self) -> list[int]:
        """Positions of their prompts."""
        return [self._positions[group] for group in sorted(self._left)]

    def take(self, count: int) -> Iterator[Sequence[int]]:
        """Places of `count` groups as they end: of all that are left, or of those that end first as a whole."""
        if count == len(self):
            self._left.clear()
            yield sorted(self._ended)
            yield from self._finished
            return
        while count:
            whole = [group for group in sorted(self._left) if self._ended.issuperset(self._places(group))][:count]
            if not whole:
                self._ended.update(next(self._finished))
                continue
            places = [place for group in whole for place in self._places(group)]
            self._left.difference_update(whole)
            self._ended.difference_update(places)
            count -= len(whole)
            yield places

    def _places(self, group: int) -> range:
        return range(group * self._samples, (group + 1) * self._samples)


class RolloutStream:
    """Batch k is trained on in step k; the engines are given it as soon as step k - `max_lag` has published its weights.

    With `carry_over` they are given that many prompts more than a batch needs. It is closed without those whose responses take longest;
    these go on and all belong to the next batch, which waits for them. Since they are a step older then, every batch is given to the
    engines a step later: no rollout is older than `max_lag`, none is dropped, and each prompt is trained on once.
    """

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
        carry_over: int = 0,
        seed: int,
        step: int,
        steps: int,
        cursor: int,
        carried: Sequence[int] = (),
    ) -> None:
        """samples: responses to each prompt, which stand together in the batch; pieces: a batch goes to scoring in at most so many;
        carry_over: prompts, fewer than a batch has; step, cursor, carried: batches that earlier starts have used, prompts that they
        have drawn, and positions of those among them that they have not trained on: these are sampled anew. Raises CheckpointError
        where that are too many for a batch, as after a change of its size."""
        self._pool, self._reward, self._scorer, self._prompts = pool, reward, scorer, prompts
        self._prompts_per_step, self._samples = batch_size // samples, samples
        self._batch_size, self._pieces, self._seed = batch_size, pieces, seed
        self._ahead, self._carry_over = max_lag - (carry_over > 0), carry_over
        self._started, self._submitted, self._steps, self._drawn = step, step, steps, cursor
        self._rows = 0
        self.cursor = cursor
        """Prompts up to the latest batch, with those that it has left behind."""
        self._drawn_before = list(carried)
        if len(carried) >= self._prompts_per_step:
            raise CheckpointError(
                f"the checkpoint carries {len(carried)} prompts over, and a batch has {self._prompts_per_step}: "
                "go on with the ppo.batch_size and ppo.samples_per_prompt that wrote it"
            )
        self._carried: Cohort | None = None
        self._in_flight: deque[Cohort] = deque()

    @property
    def carried(self) -> list[int]:
        """Positions of the prompts that the latest batch has left behind."""
        return self._carried.left if self._carried else []

    def fill(self, done: int) -> None:
        """Give the engines what may be sampled once `done` steps are trained and their weights published."""
        while self._submitted < min(done + self._ahead + 1, self._steps):
            self._submitted += 1
            spare = self._carry_over if self._submitted < self._steps else 0
            needed = (self._submitted - self._started) * self._prompts_per_step + spare - self._rows // self._samples
            drawn = self._drawn + needed - len(self._drawn_before)
            self._in_flight.append(self._submit([*self._drawn_before, *range(self._drawn, drawn)]))
            self._drawn, self._drawn_before = drawn, []

    def take(self) -> PendingScores:
        """The next batch once all of its responses have ended; their scores and reference log-probs are under way."""
        carried, cohort = self._carried, self._in_flight.popleft()
        older = len(carried) if carried else 0
        pending = PendingScores(carried=older * self._samples)
        self.cursor = cohort.left[-1] + 1
        waiting: dict[int, Rollout] = {}
        sources = ([(carried, older)] if carried else []) + [(cohort, self._prompts_per_step - older)]
        for source, count in sources:
            for places in source.take(count):
                waiting |= {source.first + place: source.sampling[place] for place in places}
                if len(waiting) * self._pieces >= self._batch_size:
                    self._send(pending, waiting)
                    waiting = {}
        if waiting:
            self._send(pending, waiting)
        self._carried = cohort if cohort else None
        return pending

    def _submit(self, positions: Sequence[int]) -> Cohort:
        span = self._prompts.take(positions[0], positions[-1] + 1 - positions[0], seed=self._seed)
        batch = [span[at - positions[0]] for at in positions for _ in range(self._samples)]
        sampling = self._pool.submit(batch, seed=self._seed + positions[0])
        cohort = Cohort(sampling, positions, samples=self._samples, first=self._rows)
        self._rows += len(batch)
        return cohort

    def _send(self, pending: PendingScores, ended: Mapping[int, Rollout]) -> None:
        rows = sorted(ended)
        rollouts = [ended[row] for row in rows]
        reference = self._scorer.logprobs([rollout.sequence for rollout in rollouts])
        pending.rows |= ended
        pending.pieces.append((rows, self._reward.score(rollouts), reference))


class PendingScores:
    """`Pending` scores and reference log-probs of a batch whose responses have ended."""

    def __init__(self, *, carried: int) -> None:
        """carried: how many rollouts the batch before has left behind; they stand first."""
        self._carried = carried
        self.rows: dict[int, Rollout] = {}  # by place in the whole of what the engines were given
        self.pieces: list[tuple[list[int], Pending[Scores], Pending[list[FloatArray]]]] = []

    @property
    def rollouts(self) -> list[Rollout]:
        """In the order of the prompts."""
        return [self.rows[row] for row in sorted(self.rows)]

    def metrics(self, version: int) -> dict[str, float]:
        """carried_share: share of the batch that the one before has left behind; carried_length, carried_age: their mean tokens, and
        versions by which their oldest tokens are behind `version`, on average."""
        carried = self.rollouts[: self._carried]
        found = {"carried_share": len(carried) / len(self.rows)}
        if carried:
            found["carried_length"] = float(np.mean([len(rollout.ids) for rollout in carried]))
            found["carried_age"] = float(np.mean([version - rollout.policy_version for rollout in carried]))
        return found

    def result(self) -> ScoredRollouts:
        """Everything, in the order of the prompts. Raises ScoringError."""
        scores = [(rows, piece.result()) for rows, piece, _ in self.pieces]
        reference = {row: logprobs for rows, _, piece in self.pieces for row, logprobs in zip(rows, piece.result(), strict=True)}
        return ScoredRollouts(self.rollouts, joined(scores), [reference[row] for row in sorted(reference)])


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
