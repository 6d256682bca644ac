"""Rules of the reward that may hang or crash, in processes of their own: every batch has a deadline, a lost process is replaced."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from app.config.shared import WorkersConfig
from app.errors import ConfigError, DeadlineError
from app.rewards.part import Failed, IsolatedPart, Sample
from app.workers.pending import last_line
from app.workers.processes import process_environment

CHUNKS_PER_PROCESS = 8
"""What a crash or a passed deadline can cost is one chunk and those behind it."""


class RuleProcess:
    """The rule, out of the loop's process. folder: where the driver was started; modules of the user's are looked for there too."""

    def __init__(self, rule: IsolatedPart, folder: str) -> None:
        import sys

        sys.path.append(folder)
        rule.check()
        self._rule = rule

    def score(self, samples: Sequence[Sample]) -> Sequence[float | Failed]:
        return self._rule.score(samples)

    def ready(self) -> None:
        """The rule can be used here."""


class RuleProcesses:
    """Processes of one part of the reward. Close them with `close`."""

    def __init__(self, name: str, rule: IsolatedPart) -> None:
        self._name, self._rule = name, rule
        self._processes = [self._start() for _ in range(rule.processes)]

    def ready(self, deadline_seconds: float) -> None:
        """Wait until every process has the rule. Raises ConfigError where one cannot have it, DeadlineError when they take too long."""
        try:
            ray.get([process.ready.remote() for process in self._processes], timeout=deadline_seconds)
        except GetTimeoutError:
            raise DeadlineError(f"reward part {self._name}: its processes did not start within {deadline_seconds:g} s") from None
        except RayError as error:
            raise ConfigError(f"reward part {self._name} cannot start in a process of its own: {last_line(error)}") from error

    def submit(self, samples: Sequence[Sample]) -> PendingRule:
        """Start scoring a batch; its deadline runs from now."""
        return PendingRule(self, samples, time.monotonic() + self._rule.deadline_seconds)

    def call(self, process: int, samples: Sequence[Sample]) -> ray.ObjectRef[Any]:
        """Queue some samples on one process."""
        return self._processes[process].score.remote(samples)

    def replace(self, process: int) -> None:
        """End a process, whatever it is doing, and start another in its place."""
        ray.kill(self._processes[process])
        self._processes[process] = self._start()

    def close(self) -> None:
        """End all processes."""
        for process in self._processes:
            ray.kill(process)

    @property
    def count(self) -> int:
        return len(self._processes)

    @property
    def deadline_seconds(self) -> float:
        return self._rule.deadline_seconds

    def _start(self) -> Any:
        return (
            ray.remote(RuleProcess)
            .options(
                num_cpus=0,  # it works while others wait
                scheduling_strategy=PlacementGroupSchedulingStrategy(placement_group=None),  # not in a trial's group
                runtime_env={"env_vars": process_environment(WorkersConfig())},
            )
            .remote(self._rule, str(Path.cwd()))
        )


@dataclass
class Call:
    """Some rows of a batch; in flight, or still to be sent. alone: never in flight together with another call of its process."""

    rows: Sequence[int]
    alone: bool = False
    reference: ray.ObjectRef[Any] | None = None


@dataclass
class PendingRule:
    """A batch in flight. `result` takes until the deadline at the most, and never raises what the rule did."""

    processes: RuleProcesses
    samples: Sequence[Sample]
    deadline: float
    _queues: list[deque[Call]] = field(init=False)

    def __post_init__(self) -> None:
        count = self.processes.count
        size = max(1, -(-len(self.samples) // (count * CHUNKS_PER_PROCESS)))
        chunks = [range(start, min(start + size, len(self.samples))) for start in range(0, len(self.samples), size)]
        self._queues = [deque(self._send(process, Call(rows)) for rows in chunks[process::count]) for process in range(count)]

    def result(self) -> list[float | Failed]:
        """One score or failure per sample, in order. A chunk in which the process died is sent again sample by sample."""
        answers: dict[int, float | Failed] = {}
        for process, queue in enumerate(self._queues):
            while queue:
                call = self._send(process, queue[0])
                try:
                    scores = ray.get(call.reference, timeout=max(0.0, self.deadline - time.monotonic()))
                except GetTimeoutError:
                    late = [row for call in queue for row in call.rows]
                    reason = f"no score within deadline_seconds = {self.processes.deadline_seconds:g}"
                    answers.update(dict.fromkeys(late, Failed(reason)))
                    self.processes.replace(process)
                    break
                except RayError as error:
                    answers.update(self._lost(process, error))
                else:
                    queue.popleft()
                    answers.update(zip(call.rows, scores, strict=True))
        return [answers[row] for row in range(len(self.samples))]

    def _lost(self, process: int, error: RayError) -> dict[int, float | Failed]:
        """The process died in the first call of its queue, or had no time left to tell its answer. From here on its successor gets
        one call at a time, so that what fails next is what was sent last."""
        queue = self._queues[process]
        self.processes.replace(process)
        first, *others = queue
        guilty = first.alone and len(first.rows) == 1
        again = [] if guilty else [Call([row], alone=True) for row in first.rows]
        queue.clear()
        queue.extend([*again, *(Call(call.rows, alone=True) for call in others)])
        return {first.rows[0]: Failed(f"its process died: {last_line(error)}")} if guilty else {}

    def _send(self, process: int, call: Call) -> Call:
        """The call in flight."""
        if call.reference is None:
            call.reference = self.processes.call(process, [self.samples[row] for row in call.rows])
        return call
