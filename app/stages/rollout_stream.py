"""From prompts to scored rollouts: batches in the engines as far ahead of the learner as the lag allows, scored as they end."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np

from app.config.ppo import PpoConfig
from app.data.prompt_stream import PromptStream
from app.errors import CheckpointError
from app.experience import DoubleArray, FloatArray, Rollout, Scores
from app.interfaces import Pending, Reward, RolloutPool, Sampling, Scorer
from app.stages.reference_scores import Baselines, reference_scores

logger = logging.getLogger(__name__)

LAST_WAIT_SECONDS = 30.0
"""For what is under way when a stream is closed; whatever hangs for longer is left to itself."""


@dataclass(frozen=True)
class ScoredRollouts:
    """One batch. reference: float32 [S-1] per rollout, log-probs of its whole sequence under the reference policy; baselines: of
    reference answers, None where they are not asked for or there are none."""

    rollouts: list[Rollout]
    scores: Scores
    reference: list[FloatArray]
    baselines: Baselines | None = None


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


class SampledBatch:
    """A batch whose responses have ended; reward and reference judge it. Built by one thread, read by others once it is complete."""

    def __init__(self, *, older: int) -> None:
        """older: how many rollouts the batch before has left behind; they stand first."""
        self._older = older
        self._rows: dict[int, Rollout] = {}  # by place in the whole of what the engines were given
        self._pieces: list[tuple[list[int], Pending[Scores], Pending[list[FloatArray]]]] = []
        self._baselines: Pending[Baselines] | None = None
        self.cursor = 0
        """Prompts up to this batch, with those that it has left behind."""
        self.carried: list[int] = []
        """Positions of the prompts that it has left behind."""

    @property
    def rollouts(self) -> list[Rollout]:
        """In the order of the prompts."""
        return [self._rows[row] for row in sorted(self._rows)]

    def metrics(self, version: int) -> dict[str, float]:
        """carried_share: share of the batch that the one before has left behind; carried_length, carried_age: their mean tokens, and
        versions by which their oldest tokens are behind `version`, on average."""
        older = self.rollouts[: self._older]
        found = {"carried_share": len(older) / len(self._rows)}
        if older:
            found["carried_length"] = float(np.mean([len(rollout.ids) for rollout in older]))
            found["carried_age"] = float(np.mean([version - rollout.policy_version for rollout in older]))
        return found

    def send(self, ended: Mapping[int, Rollout], reward: Reward, scorer: Scorer) -> None:
        """Have a piece of the batch judged."""
        rows = sorted(ended)
        rollouts = [ended[row] for row in rows]
        reference = scorer.logprobs([rollout.sequence for rollout in rollouts])
        self._rows |= ended
        self._pieces.append((rows, reward.score(rollouts), reference))

    def close(self, cursor: int, carried: Sequence[int], baselines: Reward | None) -> None:
        """There are no more pieces. baselines: judges the reference answers too."""
        self.cursor, self.carried = cursor, list(carried)
        if baselines is not None:
            self._baselines = reference_scores(baselines, self.rollouts)

    def judged(self) -> ScoredRollouts:
        """Wait for everything; in the order of the prompts. Raises ScoringError."""
        scores = [(rows, piece.result()) for rows, piece, _ in self._pieces]
        reference = {row: logprobs for rows, _, piece in self._pieces for row, logprobs in zip(rows, piece.result(), strict=True)}
        baselines = self._baselines.result() if self._baselines else None
        return ScoredRollouts(self.rollouts, joined(scores), [reference[row] for row in sorted(reference)], baselines)


Collected: TypeAlias = Future[tuple[SampledBatch, Cohort]]
"""A batch, and the cohort that may have left something to the next one."""


class RolloutStream:
    """Batch k is trained on in step k; the engines are given it as soon as step k - `max_lag` has published its weights. A thread of
    the stream's own takes what the engines have finished and has it judged, also while the learner learns. A context manager.

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
        config: PpoConfig,
        *,
        seed: int,
        step: int = 0,
        cursor: int = 0,
        carried: Sequence[int] = (),
    ) -> None:
        """step, cursor, carried: batches that earlier starts have used, prompts that they have drawn, and positions of those among them
        that they have not trained on: these are sampled anew. Raises CheckpointError where that are too many for a batch, as after a
        change of its size."""
        self._pool, self._reward, self._scorer, self._prompts = pool, reward, scorer, prompts
        self._config, self._seed = config, seed
        self._samples = config.samples_per_prompt  # of one prompt, which stand together in the batch
        self._prompts_per_step = config.batch_size // self._samples
        self._carry_over = config.prompts_carried_over
        self._ahead = config.max_lag - (self._carry_over > 0)
        self._started, self._submitted, self._drawn = step, step, cursor
        self._rows = 0
        self._drawn_before = list(carried)
        if len(carried) >= self._prompts_per_step:
            raise CheckpointError(
                f"the checkpoint carries {len(carried)} prompts over, and a batch has {self._prompts_per_step}: "
                "go on with the ppo.batch_size and ppo.samples_per_prompt that wrote it"
            )
        self._thread = ThreadPoolExecutor(1, "rollout-stream")
        self._batches: deque[tuple[Collected, Future[ScoredRollouts]]] = deque()
        self._taken = False  # the first of them, by the loop, which may still wait for its scores
        self._latest: Collected | None = None
        self._samplings: deque[Sampling] = deque(maxlen=config.max_lag + 2)  # whatever may be under way is among them

    def __enter__(self) -> RolloutStream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Give up what is under way: afterwards nobody but the caller speaks to pool, reward and scorer."""
        for sampling in self._samplings:
            sampling.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)
        left: list[Future[Any]] = [future for batch in self._batches for future in batch if not future.cancelled()]
        if wait(left, timeout=LAST_WAIT_SECONDS).not_done:
            logger.warning("what was being sampled or scored has not ended %g s after the loop has", LAST_WAIT_SECONDS)

    def fill(self, done: int) -> None:
        """Give the engines what may be sampled once `done` steps are trained and their weights published."""
        while self._submitted < min(done + self._ahead + 1, self._config.steps):
            self._submitted += 1
            spare = self._carry_over if self._submitted < self._config.steps else 0
            needed = (self._submitted - self._started) * self._prompts_per_step + spare - self._rows // self._samples
            drawn = self._drawn + needed - len(self._drawn_before)
            cohort = self._submit([*self._drawn_before, *range(self._drawn, drawn)])
            self._drawn, self._drawn_before = drawn, []
            self._latest = self._thread.submit(self._collect, cohort, self._latest)
            self._batches.append((self._latest, self._thread.submit(_judged, self._latest)))

    def take(self) -> tuple[SampledBatch, Pending[ScoredRollouts]]:
        """The next batch once all of its responses have ended, and what reward and reference say of it. Raises what the pool and the
        scoring service raise."""
        if self._taken:
            self._batches.popleft()
        self._taken = True
        collected, judged = self._batches[0]
        batch, _ = collected.result()
        return batch, judged

    def _submit(self, positions: Sequence[int]) -> Cohort:
        span = self._prompts.take(positions[0], positions[-1] + 1 - positions[0], seed=self._seed)
        batch = [span[at - positions[0]] for at in positions for _ in range(self._samples)]
        sampling = self._pool.submit(batch, seed=self._seed + positions[0])
        self._samplings.append(sampling)
        cohort = Cohort(sampling, positions, samples=self._samples, first=self._rows)
        self._rows += len(batch)
        return cohort

    def _collect(self, cohort: Cohort, before: Collected | None) -> tuple[SampledBatch, Cohort]:
        """In the stream's thread: a batch from `cohort` and from what the batch before has left, each piece judged as soon as it has
        ended; and the cohort, for the next batch."""
        carried = before.result()[1] if before else None
        older = len(carried) if carried else 0
        batch = SampledBatch(older=older * self._samples)
        cursor = cohort.left[-1] + 1
        waiting: dict[int, Rollout] = {}
        sources = ([(carried, older)] if carried else []) + [(cohort, self._prompts_per_step - older)]
        for source, count in sources:
            for places in source.take(count):
                waiting |= {source.first + place: source.sampling[place] for place in places}
                if len(waiting) * self._config.score_pieces >= self._config.batch_size:
                    batch.send(waiting, self._reward, self._scorer)
                    waiting = {}
        if waiting:
            batch.send(waiting, self._reward, self._scorer)
        batch.close(cursor, cohort.left, self._reward if self._config.reward.delta else None)
        return batch, cohort


def _judged(collected: Collected) -> ScoredRollouts:
    """In the stream's thread, behind the collecting."""
    batch, _ = collected.result()
    return batch.judged()


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
