"""Rules of the reward that may hang or crash, in processes of their own: every batch has a deadline, a lost process is replaced."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from app.config.shared import WorkersConfig
from app.errors import ConfigError
from app.rewards.part import Failed, IsolatedPart, Sample
from app.workers.pending import last_line
from app.workers.processes import process_environment
from app.workers.stacks import write_stacks_on_signal
from app.workers.watchdog import late

CHUNKS_PER_PROCESS = 8
"""A batch is sent in so many pieces; a crash repeats one of them, a hang costs one and those of its batch behind it."""

LAST_LOOK_SECONDS = 0.1
"""For an answer that came in time and is fetched after its deadline."""


class RuleProcess:
    """The rule, out of the loop's process. folder: where the driver was started; modules of the user's are looked for there too."""

    def __init__(self, rule: IsolatedPart, folder: str) -> None:
        import sys

        write_stacks_on_signal("reward rule")
        sys.path.append(folder)
        rule.check()
        self._rule = rule

    def score(self, samples: Sequence[Sample]) -> Sequence[float | Failed]:
        return self._rule.score(samples)

    def ready(self) -> None:
        """The rule can be used here."""


@dataclass
class Deadline:
    """Of the calls of a batch on one process together; it runs from when the first of them is sent."""

    end: float = math.inf


@dataclass
class Call:
    """Some samples of a batch on one process. alone: never in flight together with another call of its process, so that a death of the
    process is its own doing; reference: None until it is sent; answer: None until it is known."""

    process: int
    samples: Sequence[Sample]
    deadline: Deadline
    alone: bool = False
    reference: ray.ObjectRef[Any] | None = None
    answer: Sequence[float | Failed] | None = None
    parts: Sequence[Call] = ()


class RuleProcesses:
    """Processes of one part of the reward; any number of batches may be in flight. Close them with `close`.

    One thread speaks to them at a time: that of a loop which has lost its learner may still wait when the next loop asks."""

    def __init__(self, name: str, rule: IsolatedPart) -> None:
        self._name, self._rule = name, rule
        self._processes = [self._start() for _ in range(rule.processes)]
        self._queues: list[deque[Call]] = [deque() for _ in self._processes]
        self._turn = threading.RLock()

    def ready(self, deadline_seconds: float) -> None:
        """Wait until every process has the rule. Raises ConfigError where one cannot have it, DeadlineError when they take too long."""
        try:
            ray.get([process.ready.remote() for process in self._processes], timeout=deadline_seconds)
        except GetTimeoutError:
            raise late(f"reward part {self._name}", f"its processes did not start within {deadline_seconds:g} s") from None
        except RayError as error:
            raise ConfigError(f"reward part {self._name} cannot start in a process of its own: {last_line(error)}") from error

    def submit(self, samples: Sequence[Sample]) -> PendingRule:
        """Start scoring a batch; its deadline runs from now, and anew for what is asked again after a process was lost."""
        deadlines = [Deadline() for _ in self._processes]
        size = max(1, -(-len(samples) // (len(self._processes) * CHUNKS_PER_PROCESS)))
        calls = [
            Call(number % len(deadlines), samples[start : start + size], deadlines[number % len(deadlines)])
            for number, start in enumerate(range(0, len(samples), size))
        ]
        with self._turn:
            for call in calls:
                queue = self._queues[call.process]
                call.alone = bool(queue) and queue[0].alone  # after a death one call follows the other until all are answered
                queue.append(call)
                if not call.alone:
                    self._send(call)
        return PendingRule(self, calls)

    def finish(self, call: Call) -> Sequence[float | Failed]:
        """Wait for the answer of a call, and for those of its process before it; until its deadline at the most."""
        with self._turn:
            queue = self._queues[call.process]
            while call.answer is None and not call.parts:
                first = queue[0]
                if first.reference is None:
                    self._send(first)
                try:
                    first.answer = ray.get(first.reference, timeout=max(LAST_LOOK_SECONDS, first.deadline.end - time.monotonic()))
                    queue.popleft()
                except GetTimeoutError:
                    self._late(queue)
                except RayError as error:
                    self._lost(queue, error)
            return call.answer if call.answer is not None else [answer for part in call.parts for answer in self.finish(part)]

    def close(self) -> None:
        """End all processes."""
        for process in self._processes:
            ray.kill(process)

    def _late(self, queue: deque[Call]) -> None:
        """The first call hangs: it failed, with the others of its batch behind it, and its process is replaced."""
        failed = Failed(f"no score within deadline_seconds = {self._rule.deadline_seconds:g}")
        deadline = queue[0].deadline
        for call in queue:
            if call.deadline is deadline:
                call.answer = [failed] * len(call.samples)
        self._start_over(queue, [call for call in queue if call.answer is None])

    def _lost(self, queue: deque[Call], error: RayError) -> None:
        """The process died in the first call, or had no time left to tell its answer: it is asked again, sample by sample. A single
        sample that was alone is what killed it."""
        first, *others = queue
        if first.alone and len(first.samples) == 1:
            first.answer = [Failed(f"its process died: {last_line(error)}")]
        else:
            first.parts = [Call(first.process, [sample], first.deadline) for sample in first.samples]
        self._start_over(queue, [*first.parts, *others])

    def _start_over(self, queue: deque[Call], calls: Sequence[Call]) -> None:
        """End the queue's process, whatever it is doing, and let another go on with `calls`, one at a time. Their deadlines start over
        as well: the lost process has used up the time of all, and nobody may have looked for long."""
        number = next(number for number, other in enumerate(self._queues) if other is queue)
        ray.kill(self._processes[number])
        self._processes[number] = self._start()
        queue.clear()
        for call in calls:
            call.alone, call.reference, call.deadline.end = True, None, math.inf
            queue.append(call)

    def _send(self, call: Call) -> None:
        call.reference = self._processes[call.process].score.remote(call.samples)
        call.deadline.end = min(call.deadline.end, time.monotonic() + self._rule.deadline_seconds)

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


@dataclass(frozen=True)
class PendingRule:
    """A batch in flight."""

    processes: RuleProcesses
    calls: Sequence[Call]

    def result(self) -> list[float | Failed]:
        """One score or failure per sample, in order; never raises what the rule did."""
        return [answer for call in self.calls for answer in self.processes.finish(call)]
