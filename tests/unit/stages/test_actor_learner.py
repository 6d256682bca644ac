"""The PPO loop on in-process fakes: order of the steps, lag, agreement checks, stopping, resuming."""

from __future__ import annotations

import dataclasses
import json
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
from app.errors import AlarmError, CheckpointError, Interrupted, NonFiniteError, RolloutError, ScoringError, StaleRolloutError
from app.experience import Experience, FinishReason, Prompt, Rollout, Scores, TokenBatch
from app.numerics import Moments
from app.rewards.mix import Part, RewardMix, one_reward_model
from app.rewards.reward_model import RewardModelReward
from app.stages.actor_learner import LoopState, Parts, actor_learner_loop, collect_experience
from app.stages.rollout_stream import ScoredRollouts
from app.stages.step_checks import check_lag
from tests.counted_calls import calls_of
from tests.unit.stages.pending import Done, Sampled

RESPONSE = 3
LOGPROB = -0.5


class World:
    """All fakes at once, with a journal of what happened in which order."""

    def __init__(
        self, *, learner_logprob: float = LOGPROB, serve_stale: bool = False, failed_scores: int = 0, reference_logprob: float = LOGPROB
    ) -> None:
        self.journal: list[str] = []
        self.engine_version = -1
        self.learner_logprob = learner_logprob
        self.serve_stale = serve_stale
        self.failed_scores = failed_scores
        self.reference_logprob = reference_logprob
        self.with_critic = True
        self.experiences: list[Experience] = []
        self.trained: list[list[str]] = []
        self.steps: list[int] = []
        self.logged: list[Mapping[str, float]] = []
        self.saved: list[Mapping[str, Any]] = []
        self.waited: list[bool] = []
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
        return Done([np.full(len(s) - 1, self.reference_logprob, np.float32) for s in sequences])

    # learner
    def inspect(self, tokens: TokenBatch) -> tuple[torch.Tensor, torch.Tensor | None]:
        values_BT = torch.zeros(tokens.mask_BT.shape) if self.with_critic else None
        return torch.where(tokens.mask_BT, self.learner_logprob, 0.0), values_BT

    def update(self, experience: Experience, *, step: int) -> Mapping[str, float]:
        self.journal.append("update")
        self.steps.append(step)
        self.experiences.append(experience)
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

    def save(self, step: int, state: Mapping[str, Any], write: Callable[[Path], None]) -> None:
        write(self.folder)
        self.world.saved.append(dict(state))

    def settle(self, *, wait_for_it: bool) -> None:
        self.world.waited.append(wait_for_it)

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        self.world.logged.append(metrics)

    def event(self, stage: str, step: int, text: str) -> None:
        self.world.events.append(f"{step}: {text}")


def parts(world: Any, folder: Path) -> Parts:
    store = Store(world, folder)
    prompts = [Prompt(str(i), "", np.array([i, 1, 2], np.int32), reference=reference_of(i)) for i in range(8)]
    stream = PromptStream.over(prompts)
    return Parts(world, world, world, one_reward_model(world), world, store, store, stream, pad_id=0, max_new_tokens=10)


def reference_of(number: int) -> Any:
    """Even prompts have a reference answer, of as many tokens as their number."""
    return np.full(number, 5, np.int32) if number % 2 == 0 and number else None


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
    assert state == LoopState(step=3, version=3, prompt_cursor=12, kl_coef=0.05)
    assert [saved["step"] for saved in world.saved] == [2, 3]
    assert world.waited == [False, False, True]


def test_while_the_critic_warms_up_the_policy_keeps_its_version_and_the_penalty_its_weight(tmp_path: Path) -> None:
    """Each push says truthfully which weights it carries; the controller rests, since the KL is none of its doing."""
    world = World(reference_logprob=LOGPROB - 0.5)
    state = actor_learner_loop(parts(world, tmp_path), config(critic_warmup_steps=2, **ADAPTIVE), LoopState(), seed=0)
    assert [entry for entry in world.journal if "publish" in entry] == ["publish 0", "publish 0", "publish 0", "publish 1"]
    assert [logged["critic_warmup"] for logged in world.logged] == [1, 1, 0]
    assert [logged["kl_coef"] for logged in world.logged] == [0.1] * 3 and state.kl_coef == pytest.approx(0.1008)
    assert (state.step, state.version) == (3, 1)
    assert world.steps == [0, 1, 2]
    assert "critic_warmup" not in logged_without_warm_up(tmp_path)


def logged_without_warm_up(folder: Path) -> Mapping[str, float]:
    world = World()
    actor_learner_loop(parts(world, folder), config(steps=1), LoopState(), seed=0)
    return world.logged[0]


def test_lag_samples_ahead_of_the_update_and_ends_with_nothing_in_flight(tmp_path: Path) -> None:
    world = World()
    actor_learner_loop(parts(world, tmp_path), config(max_lag=1), LoopState(), seed=0)
    assert world.journal == [
        "publish 0",
        *("sample@0", "sample@0", "update", "publish 1"),
        *("sample@1", "update", "publish 2", "update", "publish 3"),
    ]


def test_what_a_step_does_grows_no_faster_than_its_batch(tmp_path: Path) -> None:
    """A loop over the batch inside another one would, at thousands of samples, leave the learner waiting for its controller."""

    def work(samples: int) -> int:
        step = config(steps=1, batch_size=samples, micro_batch_size=1, save_every=2)
        return calls_of(lambda: actor_learner_loop(parts(World(), tmp_path), step, LoopState(), seed=0))

    work(4)  # what is called only once
    assert work(512) < 1.5 * 8 * work(64)


def test_rewards_reach_the_log(tmp_path: Path) -> None:
    world = World()
    actor_learner_loop(parts(world, tmp_path), config(steps=1), LoopState(), seed=0)
    assert world.logged[0]["score_mean"] == 6.0  # three prompt tokens and three of response
    assert world.logged[0]["kl"] == 0.0
    always = {"staleness", "repetition_share", "finished_share", "masked_rows", "logprob_mismatch_k3", "reward/reward_model"}
    assert always <= set(world.logged[0])
    assert {"seconds/rollout", "seconds/score", "seconds/update", "seconds/push", "policy_loss"} <= set(world.logged[0])
    assert world.logged[0]["push/seconds_share"] == world.logged[0]["seconds/push"] / world.logged[0]["seconds"] < 1


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
    assert {name: world.saved[0][name] for name in ("step", "version", "prompt_cursor")} == {"step": 1, "version": 1, "prompt_cursor": 4}
    assert LoopState.restore(json.loads(json.dumps(world.saved[0]))).step == 1


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
    assert world.events[0] == "1: 1 of 4 scores of the reward reward_model failed (the model gave nan)"
    assert [event.startswith("1: alarm: failed_scores") for event in world.events[1:]] == [True]
    with pytest.raises(ScoringError, match=r"1 of 4 scores failed, .*allows \(.* failed \(the model gave nan\)\): mend that"):
        actor_learner_loop(
            parts(World(failed_scores=1), tmp_path), config(steps=1, score_pieces=1, max_failed_scores=0.2), LoopState(), seed=0
        )


def test_a_reference_answer_without_a_score_says_why(tmp_path: Path) -> None:
    class Picky(World):
        def scores(self, sequences: Sequence[Any]) -> Done:
            return Done([float("nan") if sequence[-1] == 5 else 1.0 for sequence in sequences])  # a token of the reference answers

    world, delta = Picky(), config(steps=2, reward={"delta": True}, max_failed_scores=0.9)
    actor_learner_loop(parts(world, tmp_path), delta, LoopState(), seed=0)
    assert world.events[0] == "1: 3 of 3 scores of reference answers of the reward reward_model failed (the model gave nan)"
    assert all("alarm" in event for event in world.events[1:]), "the second batch has no prompt with a reference answer"
    with pytest.raises(ScoringError, match=r"scores of reference answers of the reward reward_model failed \(the model gave nan\)"):
        actor_learner_loop(parts(Picky(), tmp_path), config(steps=2, reward={"delta": True}, max_failed_scores=0), LoopState(), seed=0)


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
        def update(self, experience: Experience, *, step: int) -> Mapping[str, float]:
            return {"policy_grad_norm": float("inf"), "value_loss": float("nan")}

    world = Broken()
    with pytest.raises(NonFiniteError, match="value_loss is nan"):
        actor_learner_loop(parts(world, tmp_path), config(), LoopState(), seed=0)
    assert (len(world.logged), world.saved) == (1, [])


def test_of_gradient_norms_only_the_infinity_of_a_step_that_loss_scaling_skipped_passes(tmp_path: Path) -> None:
    class Norm(World):
        norm = float("inf")

        def update(self, experience: Experience, *, step: int) -> Mapping[str, float]:
            return {"policy_grad_norm": self.norm}

    world = Norm()
    assert actor_learner_loop(parts(world, tmp_path), config(), LoopState(), seed=0).step == 3
    world.norm = float("nan")
    with pytest.raises(NonFiniteError, match="policy_grad_norm is nan"):
        actor_learner_loop(parts(world, tmp_path), config(), LoopState(), seed=0)


def test_lag_is_bounded() -> None:
    prompt, nothing = Prompt("a", "", np.zeros(1, np.int32)), np.zeros(2, np.float32)
    old, new = (Rollout(prompt, 0, np.zeros(2, np.int32), nothing, FinishReason.STOP, np.array(versions)) for versions in ([3, 4], [6, 6]))
    check_lag([old, new], version=5, max_lag=2)
    with pytest.raises(StaleRolloutError, match="policy version 3, the learner is at 6"):
        check_lag([new, old], version=6, max_lag=2)


GRPO = {"algorithm": {"name": "grpo"}, "samples_per_prompt": 2}


def test_groups_of_samples_and_no_critic(tmp_path: Path) -> None:
    """Two samples of each of two prompts; the cursor counts prompts; nothing about values is learnt from or logged."""
    world = World()
    world.with_critic = False
    state = actor_learner_loop(parts(world, tmp_path), config(steps=2, **GRPO), LoopState(), seed=0)
    assert state.prompt_cursor == 4
    first, second = world.trained
    assert first[0] == first[1] and first[2] == first[3] and len({*first, *second}) == 4
    for experience in world.experiences:
        assert experience.groups_B is not None and experience.groups_B.tolist() == [0, 0, 1, 1]
        assert experience.values_BT is None
        assert experience.advantages_BT is not None and experience.advantages_BT.eq(0).all()  # all scores of a group are alike here
    assert "explained_variance" not in world.logged[0]


def test_rollouts_of_one_prompt_are_one_group_wherever_they_stand() -> None:
    numbers = [3, 1, 3, 2, 1]
    ids, logprobs = np.full(2, 7, np.int32), np.zeros(2, np.float32)
    rollouts = [Rollout(Prompt(str(n), "", np.array([n], np.int32)), 0, ids, logprobs, FinishReason.STOP, ids) for n in numbers]
    tokens = TokenBatch.from_rollouts(rollouts, pad_id=0)
    zeros_BT = torch.zeros(5, 2)
    scored = ScoredRollouts(rollouts, Scores(np.zeros(5)), [logprobs] * 5)
    experience = collect_experience(scored, tokens, torch.zeros(5), zeros_BT, None)
    assert experience.groups_B is not None and experience.groups_B.tolist() == [0, 1, 0, 2, 1]


ADAPTIVE = {"kl": {"coef": 0.1, "controller": "adaptive", "target": 1.0, "horizon": 100}}


def test_adaptive_coefficient_follows_the_kl_per_sequence(tmp_path: Path) -> None:
    """Three tokens, each 0.5 nats from the reference: 1.5 per sequence against a target of 1 is an error cut to 0.2, times 4 / 100."""
    world = World(reference_logprob=LOGPROB - 0.5)
    state = actor_learner_loop(parts(world, tmp_path), config(**ADAPTIVE), LoopState(), seed=0)
    assert [logged["kl"] for logged in world.logged] == pytest.approx([1.5] * 3)
    assert [logged["kl_coef"] for logged in world.logged] == pytest.approx([0.1, 0.1 * 1.008, 0.1 * 1.008**2])
    assert [experience.kl_coef for experience in world.experiences] == pytest.approx([0.1, 0.1 * 1.008, 0.1 * 1.008**2])
    assert state.kl_coef == pytest.approx(0.1 * 1.008**3)


def test_failed_rows_are_no_sequences_to_the_controller(tmp_path: Path) -> None:
    world = World(reference_logprob=LOGPROB - 0.5, failed_scores=1)
    once = config(steps=1, score_pieces=1, max_failed_scores=0.5, **ADAPTIVE)
    state = actor_learner_loop(parts(world, tmp_path), once, LoopState(), seed=0)
    assert state.kl_coef == pytest.approx(0.1 * (1 + 0.2 * 3 / 100))


def test_a_resumed_loop_has_the_coefficient_and_the_scale_of_an_undisturbed_one(tmp_path: Path) -> None:
    options = {**ADAPTIVE, "reward": {"scale": "running", "delta": True}, "steps": 4}
    straight, halted, resumed = (World(reference_logprob=LOGPROB - 0.5) for _ in range(3))
    expected = actor_learner_loop(parts(straight, tmp_path), config(**options), LoopState(), seed=5)
    stops = iter([False, True])
    with pytest.raises(Interrupted):
        actor_learner_loop(parts(halted, tmp_path), config(**options), LoopState(), seed=5, stop_requested=lambda: next(stops))
    state = LoopState.restore(json.loads(json.dumps(halted.saved[-1])))
    assert state.step == 2 and state.scores.count > 0
    assert actor_learner_loop(parts(resumed, tmp_path), config(**options), state, seed=5) == expected
    for ours, theirs in zip(resumed.experiences, straight.experiences[2:], strict=True):
        assert ours.scores_B.equal(theirs.scores_B)
        assert ours.kl_coef == theirs.kl_coef
        assert ours.rewards_BT is not None and theirs.rewards_BT is not None and ours.rewards_BT.equal(theirs.rewards_BT)


@pytest.mark.parametrize("change", ["missing", "unknown"])
def test_a_loop_state_with_other_parts_is_refused(change: str) -> None:
    saved: dict[str, Any] = dataclasses.asdict(LoopState(kl_coef=0.1, scores=Moments(2, 1.0, 0.5)))
    assert LoopState.restore(saved) == LoopState(kl_coef=0.1, scores=Moments(2, 1.0, 0.5))
    if change == "missing":
        del saved["kl_coef"]
    else:
        saved["beta"] = 1.0
    with pytest.raises(CheckpointError, match="loop state"):
        LoopState.restore(saved)


def test_delta_reward_subtracts_the_reference_answer_where_there_is_one(tmp_path: Path) -> None:
    """The fakes score a sequence by its length: rollouts 6, reference answers 3 + prompt number."""
    world = World()
    actor_learner_loop(parts(world, tmp_path), config(steps=2, reward={"delta": True}), LoopState(), seed=0)
    shaped = {}
    for experience in world.experiences:
        shaped |= dict(zip(experience.tokens.ids_BS[:, 0].tolist(), experience.scores_B.tolist(), strict=True))
    assert shaped == {0: 6.0, 1: 6.0, 2: 1.0, 3: 6.0, 4: -1.0, 5: 6.0, 6: -3.0, 7: 6.0}
    assert world.logged[0]["score_mean"] == 6.0


def test_length_terms_read_the_token_limit(tmp_path: Path) -> None:
    """Three tokens of at most ten: with a buffer of eight the penalty is 1 / 8."""
    world = World()
    actor_learner_loop(parts(world, tmp_path), config(steps=1, reward={"overlong_buffer": 8}), LoopState(), seed=0)
    assert world.experiences[0].scores_B.tolist() == [5.875] * 4


def test_a_policy_whose_logprobs_are_no_numbers_is_none_that_differs_from_its_engine(tmp_path: Path) -> None:
    """A search marks such a trial as what it is, and does not try it again."""
    world = World(learner_logprob=float("nan"))
    with pytest.raises(NonFiniteError, match="not finite"):
        actor_learner_loop(parts(world, tmp_path), config(), LoopState(), seed=0)
