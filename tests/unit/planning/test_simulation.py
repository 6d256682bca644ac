"""The simulator of the loop: closed forms, bounds that hold for any phases, and the loop itself on a clock."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from app.planning.simulation import STEADY, LoopWork, Phases, Work, step_ends, step_seconds
from bench.loop_simulation import Run, compare

SECONDS = st.floats(0.01, 100)
PHASES = st.builds(Phases, SECONDS, SECONDS, SECONDS, SECONDS, SECONDS)


def test_without_lag_phases_follow_one_another() -> None:
    phases = Phases(rollout=5, score=2, update=3, push=1, rest=0.5)
    assert step_ends(phases, max_lag=0, steps=3) == pytest.approx([11.5, 23, 34.5])


@pytest.mark.parametrize(
    ("phases", "expected"),
    [
        (Phases(rollout=10, score=1, update=2, push=1), 11.0),  # engines are busy all the time, but for the push
        (Phases(rollout=2, score=1, update=6, push=1), 8.0),  # the learner is
    ],
)
def test_with_lag_the_slower_side_rules(phases: Phases, expected: float) -> None:
    assert step_seconds(phases, max_lag=1) == pytest.approx(expected)


def test_side_by_side_on_shared_devices_gains_nothing() -> None:
    """Two that both ask for all cores: what overlaps takes twice as long, and nothing else is saved."""
    phases = Phases(rollout=4, score=1, update=2, push=1)
    assert step_seconds(phases, max_lag=1, side_by_side=0.5) == pytest.approx(phases.total)


@settings(max_examples=60, deadline=None)
@given(PHASES, st.integers(0, 3), st.floats(0.5, 1))
@example(Phases(rollout=16, score=1, update=1, push=1, rest=15), 2, 0.5)
def test_bounds(phases: Phases, lag: int, rate: float) -> None:
    """Never faster than the busier side alone; never slower than one after the other, but for batches that the engines sample ahead in
    the steps that count, where sampling is so little faster than learning that `max_lag` batches ahead are not reached before."""
    seconds = step_seconds(phases, max_lag=lag, side_by_side=rate)
    learner = phases.score + phases.rest + phases.update + phases.push
    assert max(phases.rollout + phases.push, learner) * (1 - 1e-9) <= seconds <= (phases.total + lag * phases.rollout / STEADY) * (1 + 1e-9)


@settings(max_examples=30, deadline=None)
@given(PHASES, st.integers(0, 2), st.integers(1, 64), st.integers(1, 64))
def test_more_devices_and_more_lag_are_never_slower(phases: Phases, lag: int, engines: int, learners: int) -> None:
    work = LoopWork.of({(1, 1): phases})
    seconds = step_seconds(work.on(engines, learners), max_lag=lag)
    assert step_seconds(work.on(2 * engines, learners), max_lag=lag) <= seconds * (1 + 1e-9)
    assert step_seconds(work.on(engines, 2 * learners), max_lag=lag) <= seconds * (1 + 1e-9)
    assert step_seconds(work.on(engines, learners), max_lag=lag + 1) <= seconds * (1 + 1e-9)


def test_phases_are_fitted_to_measured_counts() -> None:
    assert Work.fitted({1: 10.0, 2: 6.0, 4: 4.0}) == Work(pytest.approx(2.0), pytest.approx(8.0))
    assert Work.fitted({2: 5.0}).on(10) == pytest.approx(1.0)
    assert Work.fitted({1: 3.0, 2: 5.0}) == Work(4.0, 0.0)  # more devices were slower: nothing to gain
    assert Work.fitted({1: 10.0, 2: 4.0}).fixed == 0.0  # better than perfect: no part below 0


def test_work_of_two_runs() -> None:
    work = LoopWork.of({(1, 1): Phases(8, 2, 4, 1, 0.2), (2, 1): Phases(5, 2, 4, 3, 0.4)})
    assert work.on(4, 1) == Phases(pytest.approx(3.5), 2, 4, 2, pytest.approx(0.3))


def test_measured_phases_are_medians_without_the_first_step() -> None:
    def step(rollout: float) -> dict[str, float]:
        spent = {"seconds/rollout": rollout, "seconds/score": 1.0, "seconds/update": 2.0, "seconds/push": 0.5}
        return {**spent, "seconds": sum(spent.values()) + 0.25, "score_mean": 0.0}

    assert Phases.measured([step(99.0), step(3.0), step(4.0), step(8.0)]) == Phases(4.0, 1.0, 2.0, 0.5, 0.25)


def test_a_run_beside_its_prediction(tmp_path: Path) -> None:
    """Phases of a run without lag predict one with it; its first step and its last one, which nothing is sampled beside, do not count."""

    def write(name: str, lag: int, seconds: list[float]) -> Run:
        workers = {"count": 2, "gpus": 0, "threads": 1}
        folder = tmp_path / name
        folder.mkdir()
        (folder / "manifest.json").write_text(
            json.dumps({"config": {"rollout": {"engines": workers}, "ppo": {"workers": workers, "max_lag": lag}}})
        )
        phases = {"seconds/rollout": 2.0, "seconds/score": 1.0, "seconds/update": 2.0, "seconds/push": 1.0}
        events = [{"stage": "ppo", "metrics": {**phases, "seconds": spent}} for spent in seconds]
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in events))
        return Run.read(folder)

    measured, lagged = write("plain", 0, [9.0, 6.0, 6.0]), write("lagged", 1, [9.0, 5.0, 5.0, 3.0])
    (own,) = compare([measured], [lagged], cores=4)
    assert (own["expected"], own["measured"]) == (pytest.approx(4.0), 5.0)
    (shared,) = compare([measured], [lagged], cores=2)
    assert shared["expected"] == pytest.approx(6.0)
