"""The PPO loop on in-process fakes: order of the steps, lag, agreement checks, stopping, resuming."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from app.alarms import AlarmWatch
from app.config.alarms import AlarmsConfig
from app.config.ppo import PpoConfig
from app.data.prompt_stream import PromptStream
from app.errors import AlarmError, Interrupted, NonFiniteError, RolloutError, ScoringError, StaleRolloutError
from app.experience import Experience, FinishReason, Prompt, Rollout, TokenBatch
from app.rewards.mix import Part, RewardMix, one_reward_model
from app.rewards.reward_model import RewardModelReward
from app.stages.actor_learner import LoopState, Parts, actor_learner_loop, check_lag
from tests.unit.stages.pending import Done, Sampled

RESPONSE = 3
LOGPROB = -0.5


class World:
    """All fakes at once, with a journal of what happened in which order."""

    def __init__(self, *, learner_logprob: float = LOGPROB, serve_stale: bool = False, failed_scores: int = 0) -> None:
        self.journal: list[str] = []
        self.engine_version = -1
        self.learner_logprob = learner_logprob
        self.serve_stale = serve_stale
        self.failed_scores = failed_scores
        self.trained: list[list[str]] = []
        self.logged: list[Mapping[str, float]] = []
        self.saved: list[Mapping[str, int]] = []
        self.events: list[str] = []

    # pool
    def submit(self, prompts: Sequence[Prompt], *, seed: int) -> Sampled:
        self.journal.append(f"sample@{self.engine_version}")
        version = 0 if self.serve_stale else self.engine_version
        ids, logprobs = np.full(RESPONSE, 7, np.int32), np.full(RESPONSE, LOGPROB, np.float32)
        return Sampled([Rollout(p, 0, ids, logprobs, FinishReason.STOP, np.full(RESPONSE, version)) for p in prompts])

    # scorer
    def scores(self, sequences: Sequence[Any]) -> Done:
        return Done([float("nan") if i < self.failed_scores else float(len(s)) for i, s in enumerate(sequences)])

    def logprobs(self, sequences: Sequence[Any]) -> Done:
        return Done([np.full(len(s) - 1, LOGPROB, np.float32) for s in sequences])

    # learner
    def inspect(self, tokens: TokenBatch) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.where(tokens.mask_BT, self.learner_logprob, 0.0), torch.zeros(tokens.mask_BT.shape)

    def update(self, experience: Experience, *, seed: int) -> Mapping[str, float]:
        self.journal.append("update")
        self.trained.append([str(i) for i in experience.tokens.ids_BS[:, 0].tolist()])
        return {"policy_loss": 0.0}

    def save(self, folder: str) -> None:
        Path(folder, "learner").touch()

    # publisher
    def publish(self, version: int) -> Mapping[str, float]:
        self.journal.append(f"publish {version}")
        self.engine_version = version
        return {"push/canary_mismatch": 0.0}


class Store:
    def __init__(self, world: World, folder: Path) -> None:
        self.world, self.folder = world, folder

    def save(self, step: int, state: Mapping[str, int], write: Callable[[Path], None]) -> None:
        write(self.folder)
        self.world.saved.append(dict(state))

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        self.world.logged.append(metrics)

    def event(self, stage: str, step: int, text: str) -> None:
        self.world.events.append(f"{step}: {text}")


def parts(world: Any, folder: Path) -> Parts:
    store = Store(world, folder)
    prompts = [Prompt(str(i), "", np.array([i, 1, 2], np.int32)) for i in range(8)]
    return Parts(world, world, world, one_reward_model(world), world, store, store, PromptStream.over(prompts), pad_id=0)


def config(**changes: Any) -> PpoConfig:
    return PpoConfig(**{"steps": 3, "batch_size": 4, "micro_batch_size": 4, "save_every": 2, **changes})


def test_synchronous_order(tmp_path: Path) -> None:
    world = World()
    state = actor_learner_loop(parts(world, tmp_path), config(), LoopState(), seed=0)
    assert world.journal == [
        "publish 0",
        *("sample@0", "update", "publish 1"),
        *("sample@1", "update", "publish 2"),
        *("sample@2", "update", "publish 3"),
    ]
    assert state == LoopState(step=3, version=3, prompt_cursor=12)
    assert [saved["step"] for saved in world.saved] == [2, 3]


def test_lag_samples_ahead_of_the_update_and_ends_with_nothing_in_flight(tmp_path: Path) -> None:
    world = World()
    actor_learner_loop(parts(world, tmp_path), config(max_lag=1), LoopState(), seed=0)
    assert world.journal == [
        "publish 0",
        *("sample@0", "sample@0", "update", "publish 1"),
        *("sample@1", "update", "publish 2", "update", "publish 3"),
    ]


def test_rewards_reach_the_log(tmp_path: Path) -> None:
    world = World()
    actor_learner_loop(parts(world, tmp_path), config(steps=1), LoopState(), seed=0)
    assert world.logged[0]["score_mean"] == 6.0  # three prompt tokens and three of response
    assert world.logged[0]["kl"] == 0.0
    always = {"staleness", "repetition_share", "finished_share", "masked_rows", "logprob_mismatch_k3", "reward/reward_model"}
    assert always <= set(world.logged[0])
    assert {"seconds/rollout", "seconds/score", "seconds/update", "seconds/push", "policy_loss"} <= set(world.logged[0])


def test_a_resumed_loop_trains_on_the_prompts_that_an_undisturbed_one_would(tmp_path: Path) -> None:
    straight = World()
    actor_learner_loop(parts(straight, tmp_path), config(steps=4), LoopState(), seed=5)
    resumed = World()
    actor_learner_loop(parts(resumed, tmp_path), config(steps=4), LoopState(step=2, version=2, prompt_cursor=8), seed=5)
    assert resumed.trained == straight.trained[2:]
    assert sorted(straight.trained[0] + straight.trained[1]) == [str(i) for i in range(8)]  # each prompt once a pass


def test_stopping_saves_a_checkpoint_first(tmp_path: Path) -> None:
    world = World()
    with pytest.raises(Interrupted, match="step 1 of 3"):
        actor_learner_loop(parts(world, tmp_path), config(), LoopState(), seed=0, stop_requested=lambda: True)
    assert world.saved == [{"step": 1, "version": 1, "prompt_cursor": 4}]


def test_an_engine_that_disagrees_with_the_learner_stops_the_run_before_the_update(tmp_path: Path) -> None:
    world = World(learner_logprob=LOGPROB + 0.01)
    with pytest.raises(RolloutError, match=r"1\.00e-02 nats"):
        actor_learner_loop(parts(world, tmp_path), config(), LoopState(), seed=0)
    assert "update" not in world.journal


def test_a_rollout_of_an_old_policy_is_refused(tmp_path: Path) -> None:
    world = World(serve_stale=True)
    with pytest.raises(StaleRolloutError, match="policy version 0, the learner is at 1"):
        actor_learner_loop(parts(world, tmp_path), config(), LoopState(), seed=0)


def test_failed_scores_are_masked_out_up_to_a_share_and_then_stop_the_run(tmp_path: Path) -> None:
    world = World(failed_scores=1)
    actor_learner_loop(parts(world, tmp_path), config(steps=1, score_pieces=1, max_failed_scores=0.25), LoopState(), seed=0)
    assert world.logged[0]["score_mean"] == 6.0
    assert world.logged[0]["failed_scores"] == 0.25
    with pytest.raises(ScoringError, match="1 of 4 scores"):
        actor_learner_loop(
            parts(World(failed_scores=1), tmp_path), config(steps=1, score_pieces=1, max_failed_scores=0.2), LoopState(), seed=0
        )


class Hackable(World):
    """A policy that finds ever more of what the trained reward model mistakes for quality; the held-out one sees through it."""

    def scores(self, sequences: Sequence[Any]) -> Done:
        return Done([self.engine_version + 0.1 * i for i, _ in enumerate(sequences)])


class Judge:
    def __init__(self, world: World) -> None:
        self.world = world

    def scores(self, sequences: Sequence[Any]) -> Done:
        return Done([-0.5 * self.world.engine_version for _ in sequences])

    logprobs = World.logprobs


def hacked(world: Hackable, folder: Path, action: str) -> Parts:
    plain = parts(world, folder)
    judge = Part("judge", (RewardModelReward(Judge(world)),), hold_out=True)  # type: ignore[arg-type]
    config = AlarmsConfig.model_validate({"reward_hacking": {"limit": 3, "window": 6, "action": action}})
    return replace(plain, reward=RewardMix((*plain.reward.parts, judge)), watch=AlarmWatch(config))  # type: ignore[attr-defined]


def test_reward_hacking_is_told_once_and_goes_on(tmp_path: Path) -> None:
    world = Hackable()
    actor_learner_loop(hacked(world, tmp_path, "warn"), config(steps=9), LoopState(), seed=0)
    (event,) = [event for event in world.events if "reward_hacking" in event]
    assert event.startswith("6: alarm: reward_hacking = ") and "held-out one falls" in event
    assert [metrics["holdout_score"] for metrics in world.logged] == [-0.5 * step for step in range(9)]
    assert "reward_hacking" not in world.logged[4] and world.logged[5]["reward_hacking"] > 3


def test_an_alarm_that_stops_does_so_after_the_step_is_recorded_and_without_a_checkpoint(tmp_path: Path) -> None:
    world = Hackable()
    with pytest.raises(AlarmError, match=r"alarms\.reward_hacking\.limit = 3: .*ppo\.kl\.coef") as caught:
        actor_learner_loop(hacked(world, tmp_path, "stop"), config(steps=9, save_every=6), LoopState(), seed=0)
    assert caught.value.metric == "reward_hacking" and caught.value.value == world.logged[-1]["reward_hacking"]
    assert (len(world.logged), world.saved) == (6, [])


def test_a_metric_that_is_not_finite_stops_before_the_update(tmp_path: Path) -> None:
    class Endless(World):
        def logprobs(self, sequences: Sequence[Any]) -> Done:
            return Done([np.full(len(s) - 1, -1e38, np.float32) for s in sequences])  # finite, their sums are not

    world = Endless()
    with pytest.raises(NonFiniteError, match=r"metric (reward|kl|advantage)"):
        actor_learner_loop(parts(world, tmp_path), config(), LoopState(), seed=0)
    assert "update" not in world.journal
    assert len(world.logged) == 1


def test_a_metric_of_the_update_that_is_not_finite_stops_after_it_is_recorded(tmp_path: Path) -> None:
    class Broken(World):
        def update(self, experience: Experience, *, seed: int) -> Mapping[str, float]:
            return {"policy_grad_norm": float("inf"), "value_loss": float("nan")}

    world = Broken()
    with pytest.raises(NonFiniteError, match="value_loss is nan"):
        actor_learner_loop(parts(world, tmp_path), config(), LoopState(), seed=0)
    assert (len(world.logged), world.saved) == (1, [])


def test_lag_is_bounded() -> None:
    prompt = Prompt("a", "", np.zeros(1, np.int32))
    rollout = Rollout(prompt, 0, np.zeros(2, np.int32), np.zeros(2, np.float32), FinishReason.STOP, np.array([3, 4], np.int32))
    check_lag([rollout], version=5, max_lag=2)
    with pytest.raises(StaleRolloutError):
        check_lag([rollout], version=6, max_lag=2)
