"""A batch that leaves its longest responses to the next one: nothing is lost, used twice or too old."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from app.config.ppo import PpoConfig
from app.config.recipe import Recipe
from app.data.prompt_stream import PromptStream
from app.errors import CheckpointError, Interrupted
from app.experience import Experience, FinishReason, Prompt, Rollout
from app.stages.actor_learner import LoopState, actor_learner_loop
from tests.unit.stages.test_actor_learner import World, config, parts

PROMPTS = 200


class Uneven:
    """Responses of random lengths; the shorter of what is still in the engine ends first."""

    def __init__(self, world: UnevenWorld, prompts: Sequence[Prompt]) -> None:
        self.world, self.prompts, self.begun = world, prompts, world.engine_version
        self.lengths = [world.random.randint(1, 9) for _ in prompts]
        self.rollouts: dict[int, Rollout] = {}

    def finished(self) -> Iterator[Sequence[int]]:
        for place in sorted(range(len(self.prompts)), key=lambda place: self.lengths[place]):
            length = self.lengths[place]
            versions = np.array([self.begun] + [self.world.engine_version] * (length - 1), np.int32)
            ids, logprobs = np.full(length, 7, np.int32), np.full(length, -0.5, np.float32)
            self.rollouts[place] = Rollout(self.prompts[place], 0, ids, logprobs, FinishReason.STOP, versions)
            yield [place]

    def __getitem__(self, place: int) -> Rollout:
        return self.rollouts[place]

    def cancel(self) -> None:
        """Nobody waits here for long."""

    def result(self) -> list[Rollout]:
        raise AssertionError("a batch is taken without waiting for all")


class UnevenWorld(World):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.random = random.Random(seed)
        self.lengths: list[list[int]] = []

    def submit(self, prompts: Sequence[Prompt], *, seed: int) -> Any:
        return Uneven(self, prompts)

    def update(self, experience: Experience, *, step: int) -> Mapping[str, float]:
        self.lengths.append(experience.tokens.response_lengths_B.tolist())
        return super().update(experience, step=step)


def run(world: UnevenWorld, folder: Path, settings: PpoConfig, state: LoopState | None = None, stop_after: int = 0) -> LoopState:
    stream = PromptStream.over([Prompt(str(i), "", np.array([i, 1, 2], np.int32)) for i in range(PROMPTS)])
    steps = iter(range(1, PROMPTS))
    return actor_learner_loop(
        replace(parts(world, folder), prompts=stream),
        settings,
        state or LoopState(),
        seed=3,
        stop_requested=lambda: next(steps) == stop_after,
    )


CASES = [(1, 0.25, 1), (1, 0.75, 1), (2, 0.5, 1), (3, 0.25, 1), (2, 0.5, 2), (1, 0.5, 4), (2, 0.0, 2)]


@pytest.mark.parametrize(("max_lag", "share", "samples"), CASES)
def test_every_prompt_once_in_batches_of_the_size_asked_for(max_lag: int, share: float, samples: int, tmp_path: Path) -> None:
    """Also where the run is stopped on its way and goes on: what was carried over then is drawn again."""
    settings = config(steps=12, batch_size=8, max_lag=max_lag, carry_over=share, samples_per_prompt=samples)
    carried = round(share * 8 / samples)
    for seed in range(3):
        world = UnevenWorld(seed)
        with pytest.raises(Interrupted):
            run(world, tmp_path, settings, stop_after=2 + 3 * seed)
        state = LoopState.restore(json.loads(json.dumps(world.saved[-1])))
        assert len(state.carried) == carried
        assert state.prompt_cursor == state.step * 8 // samples + carried
        end = run(world, tmp_path, settings, state)
        assert (end.step, end.prompt_cursor, end.carried) == (12, 96 // samples, ())
        assert [len(batch) for batch in world.trained] == [8] * 12
        used = [prompt for batch in world.trained for prompt in batch]
        straight = UnevenWorld(seed)
        run(straight, tmp_path, config(steps=12, batch_size=8, samples_per_prompt=samples))
        assert sorted(used) == sorted(prompt for batch in straight.trained for prompt in batch)
        assert all(len(set(used[i : i + samples])) == 1 for i in range(0, 96, samples)), "a group stays together"
        assert len(set(used)) == 96 // samples
        assert max(metrics["staleness"] for metrics in world.logged) == max_lag


def test_the_longest_are_left_to_the_next_batch_and_counted(tmp_path: Path) -> None:
    world = UnevenWorld(0)
    run(world, tmp_path, config(steps=6, batch_size=8, max_lag=1, carry_over=0.25))
    assert [metrics["carried_share"] for metrics in world.logged] == [0.0] + [0.25] * 5
    for lengths, metrics in zip(world.lengths[1:], world.logged[1:], strict=True):
        assert metrics["carried_length"] == np.mean(lengths[:2])
        assert metrics["carried_age"] == 1.0
    for here, after in zip(world.lengths[:-1], world.lengths[1:], strict=True):
        assert max(here[2:]) <= min(after[:2]), "whoever stays behind is no shorter than who did not"


def test_the_metrics_are_those_of_runs_that_carry_over(tmp_path: Path) -> None:
    world = UnevenWorld(0)
    run(world, tmp_path, config(steps=2, batch_size=8, max_lag=1))
    assert "carried_share" not in world.logged[1]


def test_a_checkpoint_that_carries_more_than_a_batch_is_refused(tmp_path: Path) -> None:
    state = LoopState(step=1, version=1, prompt_cursor=16, carried=(3, 4, 7, 9))
    with pytest.raises(CheckpointError, match=r"carries 4 prompts over, and a batch has 4: go on with the ppo\.batch_size"):
        run(UnevenWorld(0), tmp_path, config(batch_size=4, max_lag=1, carry_over=0.25), state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ppo": {"carry_over": 0.25}}, "ppo.max_lag = 0 allows none: set ppo.max_lag = 1"),
        ({"ppo": {"carry_over": 0.005, "max_lag": 1}}, "less than one of the 64 prompts of a batch: set ppo.carry_over = 0.016"),
        ({"ppo": {"carry_over": 0.25, "max_lag": 1}, "rollout": {"in_flight": "redo"}}, 'set rollout.in_flight = "keep"'),
        ({"ppo": {"carry_over": 0.25, "max_lag": 1}, "rollout": {"in_flight": "wait"}}, 'set rollout.in_flight = "keep"'),
        ({"ppo": {"carry_over": 0.25, "max_lag": 1}, "rollout": {"colocate": True}}, "rollout.colocate = false"),
        ({"ppo": {"carry_over": 0.25, "max_lag": 1}, "run": {"determinism": "exact"}}, "ppo.max_lag = 1 is not for run.determinism"),
    ],
)
def test_contradictions_are_refused_with_the_remedy(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Recipe.model_validate(changes)
