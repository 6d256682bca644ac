"""The learner's ranks as Ray actors, behind the `Learner` of the loop.

Shape legend: B rollouts, T response tokens (see app.experience).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
import torch

from app.config.rollout import Transfer
from app.errors import CheckpointError, CorralError, WeightPushError
from app.experience import Experience, FloatArray, IntArray, TokenBatch
from app.workers.learner import LearnerSpec, LearnerWorker
from app.workers.pending import collect
from app.workers.processes import WAITING_YIELDS, process_options
from app.workers.pushed_policy import PushedPolicy

LOST_SECONDS = 30.0
"""How long a rank that answers nothing, because it works or hangs, is given to turn out to be dead: Ray takes so long to see that a
node is gone."""


class RayLearner:
    """`Learner` over one actor per rank."""

    def __init__(self, workers: Sequence[Any], starting: Sequence[ray.ObjectRef[None]], *, deadline_seconds: float) -> None:
        self.workers = list(workers)
        self._starting = list(starting)
        self._deadline_seconds = deadline_seconds

    def ready(self) -> None:
        """Wait until every rank has built its engines; raises what a rank raised meanwhile."""
        collect(self._starting, phase="learner start", deadline_seconds=self._deadline_seconds, failure=CorralError)

    def lost(self) -> list[int]:
        """Ranks whose process has ended or cannot be reached. Returns at once where one is found or all answer."""
        waiting = {worker.pid.remote(): rank for rank, worker in enumerate(self.workers)}
        found: list[int] = []
        end = time.monotonic() + LOST_SECONDS
        while waiting and not found:
            ended, _ = ray.wait(list(waiting), num_returns=1, timeout=max(0.0, end - time.monotonic()))
            if not ended:
                break
            ended, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=0)
            for call in ended:
                rank = waiting.pop(call)
                try:
                    ray.get(call)
                except ray.exceptions.RayError:
                    found.append(rank)
        return sorted(found)

    def inspect(self, tokens: TokenBatch) -> tuple[torch.Tensor, torch.Tensor | None]:
        answers = self._each("inspect", ray.put(tokens))
        in_order = torch.cat([rows for rows, _, _ in answers]).argsort()
        logprobs_BT = torch.cat([logprobs for _, logprobs, _ in answers])[in_order]
        values = [values for _, _, values in answers if values is not None]
        return logprobs_BT, torch.cat(values)[in_order] if values else None

    def update(self, experience: Experience, *, step: int) -> dict[str, float]:
        return self._each("update", ray.put(experience), step)[0]

    def logprobs(self, sequences: Sequence[IntArray]) -> list[FloatArray]:
        return self._each("logprobs", list(sequences), failure=WeightPushError)[0]

    def pushed_policy(self) -> PushedPolicy:
        return self._each("pushed_policy", failure=WeightPushError)[0]

    def connect_engines(self, engines: Sequence[Any], transfer: Transfer, *, tensor_parallel: int) -> None:
        """Make ready for `send_policy`."""
        address = self._each("address")[0]
        self._each("connect_engines", list(engines), transfer, tensor_parallel, address, failure=WeightPushError)

    def send_policy(self, version: int) -> None:
        """Have the ranks give all engines the policy as it is now, as `version`."""
        self._each("send_policy", version, failure=WeightPushError)

    def save(self, folder: str) -> None:
        self._each("save", folder, failure=CheckpointError)

    def load(self, folder: str) -> None:
        self._each("load", folder, failure=CheckpointError)

    def export(self, folder: str) -> None:
        self._each("export", folder)

    def _each(self, method: str, *args: Any, failure: type[CorralError] = CorralError) -> list[Any]:
        calls = [getattr(worker, method).remote(*args) for worker in self.workers]
        return collect(calls, phase=f"learner: {method}", deadline_seconds=self._deadline_seconds, failure=failure)


@contextmanager
def learner_group(spec: LearnerSpec, *, deadline_seconds: float, placement: Sequence[Any] = ()) -> Iterator[RayLearner]:
    """Start one actor per rank and end the processes at exit. The ranks build their engines while the caller goes on;
    `RayLearner.ready` waits for them.

    placement: a Ray scheduling strategy per rank (default: wherever there is room).
    """
    workers_config = spec.config.workers
    worker_class = ray.remote(LearnerWorker)
    workers = [
        worker_class.options(
            **process_options(workers_config, **WAITING_YIELDS), scheduling_strategy=placement[rank] if placement else "DEFAULT"
        ).remote()
        for rank in range(workers_config.count)
    ]
    try:
        address = workers[0].address.remote()  # Ray hands its value to the ranks
        starting = [worker.start.remote(spec, rank, len(workers), address) for rank, worker in enumerate(workers)]
        yield RayLearner(workers, starting, deadline_seconds=deadline_seconds)
    finally:
        for worker in workers:
            ray.kill(worker)
