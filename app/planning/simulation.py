"""How long a PPO step takes when engines sample while the learner learns: the loop of `app.stages.actor_learner` without its work.

Given are the phases of a step as a run at `ppo.max_lag = 0` measures them, where each phase waits for the one before it. Engines are
one queue: they sample batch after batch, pause while weights are pushed, and are given batch k once step k - max_lag - 1 is published.
So several batches in flight do not make an engine faster here, which continuous batching does a little. With a lag reward and reference
judge while the learner learns, and of the score phase the learner's own passes are left; the whole phase is taken for them, which is
too much where reward or reference are slower than the learner.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

PHASES = ("rollout", "score", "update", "push")
WARM, STEADY = 12, 12
"""Steps in which the queue fills, in most cases, and those after them whose mean is the time of a usual step."""


@dataclass(frozen=True)
class Phases:
    """Seconds of one step: engines sample (rollout), reward, reference and learner judge (score), the learner learns (update), weights
    go to the engines (push), and what the controller does itself between score and update (rest)."""

    rollout: float
    score: float
    update: float
    push: float
    rest: float = 0.0

    @classmethod
    def measured(cls, steps: Sequence[Mapping[str, float]]) -> Phases:
        """Medians over the `ppo` metrics of a run's steps at max_lag = 0, without the first one, which warms caches up."""
        kept = steps[1:] or steps
        phases = {phase: statistics.median(step[f"seconds/{phase}"] for step in kept) for phase in PHASES}
        rest = statistics.median(step["seconds"] - sum(step[f"seconds/{phase}"] for phase in PHASES) for step in kept)
        return cls(**phases, rest=max(0.0, rest))

    @property
    def total(self) -> float:
        return self.rollout + self.score + self.update + self.push + self.rest


@dataclass(frozen=True)
class Work:
    """A phase by the number of devices that share it: fixed + shared / devices, in seconds (Amdahl's law)."""

    fixed: float
    shared: float

    @classmethod
    def fitted(cls, seconds: Mapping[int, float]) -> Work:
        """Least squares over measured device counts, neither part below 0. A single count is taken to scale perfectly."""
        if len(seconds) == 1:
            ((devices, measured),) = seconds.items()
            return cls(0.0, devices * measured)
        inverse = [1 / devices for devices in seconds]
        slope, level = statistics.linear_regression(inverse, list(seconds.values()))
        if slope < 0:
            return cls(statistics.mean(seconds.values()), 0.0)
        if level < 0:
            return cls(0.0, sum(x * y for x, y in zip(inverse, seconds.values(), strict=True)) / sum(x * x for x in inverse))
        return cls(level, slope)

    def on(self, devices: int) -> float:
        return self.fixed + self.shared / devices


@dataclass(frozen=True)
class LoopWork:
    """The phases of a step for any number of devices: rollout shared by engines, score and update by learners."""

    rollout: Work
    score: Work
    update: Work
    push: float
    rest: float = 0.0

    @classmethod
    def of(cls, runs: Mapping[tuple[int, int], Phases]) -> LoopWork:
        """From the measured phases of one run or several, by (engines, learners). Push and rest are their means."""

        def fit(phase: str, place: int) -> Work:
            counts = sorted({devices[place] for devices in runs})
            means = {n: statistics.mean(getattr(run, phase) for devices, run in runs.items() if devices[place] == n) for n in counts}
            return Work.fitted(means)

        push, rest = (statistics.mean(getattr(run, phase) for run in runs.values()) for phase in ("push", "rest"))
        return cls(fit("rollout", 0), fit("score", 1), fit("update", 1), push, rest)

    def on(self, engines: int, learners: int) -> Phases:
        return Phases(self.rollout.on(engines), self.score.on(learners), self.update.on(learners), self.push, self.rest)


def step_seconds(phases: Phases, *, max_lag: int, side_by_side: float = 1.0) -> float:
    """Seconds of a usual step; see `step_ends`."""
    last = WARM + max_lag  # and as many behind what is counted: the engines of a run's last steps have nothing left to do
    ends = step_ends(phases, max_lag=max_lag, steps=last + STEADY + last, side_by_side=side_by_side)
    return (ends[last + STEADY - 1] - ends[last - 1]) / STEADY


def step_ends(phases: Phases, *, max_lag: int, steps: int, side_by_side: float = 1.0) -> list[float]:
    """When each step has ended, its weights published; seconds after the first prompts were given to the engines.

    side_by_side: how fast engines and learner each are while both work, in parts of their speed alone. 1 on devices of their own;
    on shared ones the devices there are, by the devices that both together ask for.
    """
    ends: list[float] = []
    now, sampled, sampling_left = 0.0, 0, phases.rollout
    learning: deque[float] = deque()  # what is left of the step under way: score, update, push
    while len(ends) < steps:
        if not learning and sampled > len(ends):
            learning = deque([phases.score, phases.rest + phases.update, phases.push])
        samples = sampled < min(len(ends) + max_lag + 1, steps) and len(learning) != 1  # a push alone is left: engines wait for it
        rate = side_by_side if samples and learning else 1.0
        spent = min(sampling_left if samples else math.inf, learning[0] if learning else math.inf)  # at full speed
        now += spent / rate
        if samples:
            sampling_left -= spent
            if sampling_left <= 0:
                sampled, sampling_left = sampled + 1, phases.rollout
        if learning:
            learning[0] -= spent
            if learning[0] <= 0:
                learning.popleft()
                if not learning:
                    ends.append(now)
    return ends
