"""The PPO loop with a learner that loses a process at any of its calls: the result is that of a loop that lost none."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from app.checkpoint import CheckpointStore, OverlappedCheckpoints
from app.config.ppo import PpoConfig
from app.data.prompt_stream import PromptStream
from app.errors import AlarmError, CorralError, LearnerError, NonFiniteError, RolloutError
from app.experience import Experience, FinishReason, Prompt, Rollout, TokenBatch
from app.rewards.mix import one_reward_model
from app.stages.actor_learner import LoopState, Parts, actor_learner_loop
from app.stages.healing import HealedLearner
from tests.unit.stages.pending import Done, Sampled

LOGPROB = -0.5
STEPS, BATCH = 5, 4


class Learner:
    """One group. Its weights are a number that every batch moves in a way of its own; it dies when the call `dies_at` comes."""

    def __init__(self, calls: list[str], dies_at: int | None, error: CorralError | None, error_kills: bool) -> None:
        self.calls, self.dies_at, self.error, self.error_kills = calls, dies_at, error, error_kills
        self.weights = 1.0
        self.dead = False

    def call(self, name: str) -> None:
        self.calls.append(name)
        if len(self.calls) - 1 == self.dies_at:
            self.dead = self.error is None or self.error_kills
            if self.error is not None:
                raise self.error
        if self.dead:
            raise CorralError(f"learner: {name}: a worker process died")

    def ready(self) -> None:
        self.call("ready")

    def lost(self) -> Sequence[int]:
        return [1] if self.dead else []

    def inspect(self, tokens: TokenBatch) -> tuple[torch.Tensor, torch.Tensor | None]:
        self.call("inspect")
        return torch.where(tokens.mask_BT, LOGPROB, 0.0), torch.zeros(tokens.mask_BT.shape)

    def update(self, experience: Experience, *, step: int) -> Mapping[str, float]:
        self.call("update")
        assert experience.advantages_BT is not None
        ids = experience.tokens.ids_BS.double()
        self.weights = float((self.weights * 1.25 + (ids * torch.arange(1, ids.shape[1] + 1)).sum() + step) % 97)
        return {"policy_loss": self.weights}

    def save(self, folder: str) -> None:
        Path(folder, "cut").write_text("half")
        self.call("save")
        Path(folder, "weights").write_text(json.dumps(self.weights))

    def load(self, folder: str) -> None:
        self.call("load")
        self.weights = json.loads(Path(folder, "weights").read_text())


@dataclass(frozen=True)
class Publisher:
    world: World
    learner: Learner

    def publish(self, version: int) -> Mapping[str, float]:
        self.learner.call("push")
        self.world.engine = (self.learner.weights, version)
        return {}


class World:
    """Engines, scorers and tracker, which outlive the learners; `life`: at which call of the first learner, counted from its start, a
    process of it dies, of the second, ..."""

    def __init__(
        self, folder: Path, *life: int, error: CorralError | None = None, error_kills: bool = False, restarts: int = 2, **config: Any
    ) -> None:
        self.store = CheckpointStore(folder)
        self.config = PpoConfig(
            **{"steps": STEPS, "batch_size": BATCH, "micro_batch_size": BATCH, "save_every": 2, **config},
            kl={"coef": 0.1, "controller": "adaptive", "target": 1.0, "horizon": 50},  # type: ignore[arg-type]
            reward={"scale": "running"},  # type: ignore[arg-type]
        )
        self.life, self.error, self.error_kills, self.restarts = list(life), error, error_kills, restarts
        self.calls: list[list[str]] = []
        self.steps: dict[int, Mapping[str, float]] = {}
        self.notes: list[str] = []
        self.engine: tuple[float, int] = (1.0, 0)  # weights, version
        self.alive = self.forgotten = 0
        self.forget_first = False

    @contextmanager
    def start(self) -> Iterator[Learner]:
        calls: list[str] = []
        self.calls.append(calls)
        self.alive += 1
        try:
            yield Learner(calls, self.life.pop(0) if self.life else None, self.error, self.error_kills)
        finally:
            self.alive -= 1

    # pool and scorer
    def submit(self, prompts: Sequence[Prompt], *, seed: int) -> Sampled:
        weights, version = self.engine
        ids = [np.array([2 + (int(weights * 8) + seed + place) % 50, 7], np.int32) for place in range(len(prompts))]
        rollouts = [
            Rollout(prompt, 0, row, np.full(2, LOGPROB, np.float32), FinishReason.STOP, np.full(2, version))
            for prompt, row in zip(prompts, ids, strict=True)
        ]
        return Sampled(rollouts)

    def scores(self, sequences: Sequence[Any]) -> Done:
        return Done([float(row.sum() % 11) for row in sequences])

    def logprobs(self, sequences: Sequence[Any]) -> Done:
        return Done([np.full(len(row) - 1, LOGPROB - row.sum() % 3 / 4, np.float32) for row in sequences])

    def discard(self) -> None:
        assert self.alive == (0 if self.forget_first else 1), "the lost group has ended, and the next one loads"
        self.forgotten += 1
        self.engine = (float("nan"), -1)  # nothing may be sampled before the next group has brought its weights

    # tracker
    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        self.steps[step] = {name: value for name, value in metrics.items() if "second" not in name}

    def event(self, stage: str, step: int, text: str) -> None:
        raise AssertionError(text)

    def run(self) -> tuple[LoopState, float]:
        """As the stage does it: from the newest checkpoint, or from the start. The state and the weights at the end."""
        prompts = PromptStream.over([Prompt(str(i), "", np.array([i, 1], np.int32)) for i in range(20)])

        def work(learner: Learner) -> tuple[LoopState, float]:
            saved, state = self.store.latest(), LoopState()
            if saved is not None:
                learner.load(str(saved.path))
                state = LoopState.restore(saved.state)

            class Publisher:
                def publish(_, version: int) -> Mapping[str, float]:
                    learner.call("push")
                    self.engine = (learner.weights, version)
                    return {}

            with OverlappedCheckpoints(self.store, deadline_seconds=60) as store:
                parts = Parts(learner, self, Publisher(), one_reward_model(self), self, self, store, prompts, pad_id=0, max_new_tokens=10)  # type: ignore[arg-type]
                state = actor_learner_loop(parts, self.config, state, seed=3)
            learner.call("export")
            return state, learner.weights

        healed: HealedLearner[Learner] = HealedLearner(
            self.start, restarts=self.restarts, forget=self.discard, note=self.notes.append, forget_first=self.forget_first
        )
        with healed as learner:
            return learner.run(work)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda file: None)


def calls_of_an_undisturbed_run() -> list[str]:
    step = ["inspect", "update", "push"]
    return ["ready", "push", *step, *step, "save", *step, *step, "save", *step, "save", "export"]


@pytest.fixture(params=[0, 1], ids=["synchronous", "one step ahead"])
def lag(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.mark.parametrize("call", range(len(calls_of_an_undisturbed_run())))
def test_a_process_lost_at_any_call_changes_nothing(call: int, lag: int, tmp_path: Path) -> None:
    """Weights, step counters, prompts, KL weight, reward moments and the metrics of every step."""
    straight = World(tmp_path / "straight", max_lag=lag)
    expected = straight.run()
    assert straight.calls == [calls_of_an_undisturbed_run()]
    world = World(tmp_path / "healed", call, max_lag=lag)
    state, weights = world.run()
    assert (len(world.calls), world.forgotten) == (2, 1)
    if lag == 0:
        assert (state, weights, world.steps) == (*expected, straight.steps)
        assert asdict(state) == asdict(LoopState.restore(world.store.latest().state))  # type: ignore[union-attr]
    assert (state.step, state.prompt_cursor) == (STEPS, STEPS * BATCH)
    assert sorted(world.steps) == list(range(1, STEPS + 1))
    assert world.notes == ["ppo: learner rank 1 died; the learner starts anew from the last checkpoint (1 more may be lost)"]
    assert world.alive == 0


def test_engines_that_share_the_learners_gpus_start_anew_before_the_next_learner_comes_onto_them(tmp_path: Path) -> None:
    world = World(tmp_path, 3)
    world.forget_first = True
    world.run()
    assert (len(world.calls), world.forgotten) == (2, 1)


def test_two_losses_one_after_the_other(tmp_path: Path) -> None:
    expected = World(tmp_path / "straight").run()
    world = World(tmp_path / "healed", 8, 3)
    assert world.run() == expected
    first, second, third = world.calls
    assert (first[-1], second[1:]) == ("save", ["push", "inspect", "update"]), "no checkpoint was complete, and none was loaded"
    assert third[1:] == calls_of_an_undisturbed_run()[1:]


def test_so_many_losses_and_no_more(tmp_path: Path) -> None:
    world = World(tmp_path, 3, 3, restarts=1)
    with pytest.raises(CorralError, match=r"^learner rank 1 died, and ppo\.max_restarts is used up.*same command"):
        world.run()
    assert (len(world.calls), world.alive) == (2, 0)


@pytest.mark.parametrize(
    ("error", "dies"),
    [
        (RolloutError("engine and learner disagree"), False),
        (NonFiniteError("nan"), True),
        (LearnerError("twice"), True),
        (AlarmError("kl", 9.0, 1.0, "lower it"), True),
    ],
)
def test_what_no_loss_explains_ends_the_run(error: CorralError, dies: bool, tmp_path: Path) -> None:
    """Also where a process dies of it: the next one would come to the same."""
    world = World(tmp_path, 3, error=error, error_kills=dies)
    with pytest.raises(type(error)):
        world.run()
    assert (len(world.calls), world.alive) == (1, 0)
