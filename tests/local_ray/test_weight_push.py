"""Learner and rollout engine, real: DeepSpeed ranks, vLLM, and the push between them, for untied and tied embeddings."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from app.config.ppo import PolicyAdapterConfig, PpoConfig
from app.config.rollout import RolloutConfig
from app.config.shared import DeepSpeedConfig, OptimizerConfig, WorkersConfig
from app.errors import WeightPushError
from app.experience import Experience, Prompt, Rollout
from app.models.heads import init_reward_model, save_reward_model
from app.models.load import load_causal_lm, load_tokenizer
from app.workers.learner import LearnerSpec
from app.workers.learner_group import RayLearner, learner_group
from app.workers.rollout_pool import VllmRolloutPool, rollout_pool
from app.workers.weight_publisher import WeightPublisher, canaries_of, canary_mismatch
from tests.inspected_rollouts import experience_of
from tests.tiny_models import VOCABULARY, make_llama, make_neox

LIMIT = 1e-4
COMPILER = shutil.which("g++") is not None


def direct_logprobs(model_path: str, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        logits = load_causal_lm(model_path)(torch.from_numpy(ids.astype(np.int64))[None]).logits[0]
    return logits.log_softmax(-1)[:-1].gather(-1, torch.from_numpy(ids.astype(np.int64))[1:, None])[:, 0].numpy()


@pytest.mark.parametrize(
    ("make", "zero_stage", "eager"), [(make_neox, 1, not COMPILER), (make_llama, 3, True)], ids=["untied-zero1-compiled", "tied-zero3"]
)
def test_push(make: Callable[[Path], str], zero_stage: int, eager: bool, tmp_path: Path) -> None:
    policy = make(tmp_path / "policy")
    reward = str(tmp_path / "reward")
    save_reward_model(init_reward_model(policy, seed=0), load_tokenizer(policy), reward, reward_offset=0.5)
    optimizer = OptimizerConfig(lr=1e-2, eps=1e-5)
    config = PpoConfig(
        batch_size=8,
        epochs=1,
        micro_batch_size=2,
        micro_batch_tokens=40 if zero_stage == 3 else None,
        reuse_forward=zero_stage < 3,
        policy=optimizer,
        critic=optimizer,
        workers=WorkersConfig(count=2, cpus=0.5),
        deepspeed=DeepSpeedConfig(zero_stage=zero_stage),  # type: ignore[arg-type]
    )
    rollout = RolloutConfig(max_new_tokens=12, engines=WorkersConfig(cpus=0.5), kv_cache_gib=0.1, enforce_eager=eager)
    rng = np.random.default_rng(0)
    group = Prompt("group", "", rng.integers(4, VOCABULARY, size=40, dtype=np.int32))  # whose first block the engine computes once
    prompts = [Prompt(str(i), "", rng.integers(4, VOCABULARY, size=5 + i, dtype=np.int32)) for i in range(5)] + 3 * [group]
    spec = LearnerSpec(policy, reward, "fp32", 1.0, config)
    with rollout_pool(policy, rollout, precision="fp32", max_prompt_length=64, eos_ids=[1], seed=0, deadline_seconds=300) as pool:
        canaries = check_whole_policy(spec, pool, rollout, prompts, tmp_path)
        check_adapters(spec, pool, prompts, canaries)


def check_whole_policy(
    spec: LearnerSpec, pool: VllmRolloutPool, rollout: RolloutConfig, prompts: list[Prompt], tmp_path: Path
) -> list[np.ndarray]:
    """Every weight is trained and pushed. Returns sequences that engine and learner were compared on."""
    policy, config = spec.policy_path, spec.config
    with learner_group(spec, deadline_seconds=300) as learner:
        pool.ready()
        learner.ready()
        rollouts = pool.submit(prompts, seed=1).result()
        check_rollouts(pool, rollouts, prompts, policy)
        experience = experience_of(rollouts, learner)
        assert float((experience.proximal_BT - experience.behaviour_BT).abs().max()) < LIMIT
        longest = pool.submit([Prompt("longest", "", np.full(64, 9, np.int32))], seed=1).result()
        assert len(longest[0].ids) == rollout.max_new_tokens  # a canary that fills the engine's context
        canaries = canaries_of([rollouts[0], *longest])
        before = pool.logprobs(canaries)
        metrics = learner.update(config.make_algorithm().credit(experience, kl_coef=0.0), step=0)
        assert metrics["first_step_mismatch"] < LIMIT
        publisher = WeightPublisher(learner, pool, canaries, limit=LIMIT)
        with pytest.raises(WeightPushError, match="policy version 1"):
            publisher._verify(1)  # the engine still holds the old weights, and that is noticed
        pushed = publisher.publish(1)
        assert pushed["push/canary_mismatch"] < LIMIT
        assert pushed["push/share"] == 1
        after = pool.logprobs(canaries)
        assert canary_mismatch(before, after) > 100 * LIMIT
        again = pool.submit(prompts, seed=1).result()
        assert {rollout.policy_version for rollout in again} == {1}
        assert float((experience_of(again, learner).proximal_BT - experience_of(again, learner).behaviour_BT).abs().max()) < LIMIT
        check_checkpoint(learner, experience, config, canaries, tmp_path)
        learner.export(str(tmp_path / "exported"))
        exported = direct_logprobs(str(tmp_path / "exported"), canaries[0])
        assert float(np.abs(exported - learner.logprobs(canaries[:1])[0]).max()) < LIMIT
        assert canary_mismatch(pool.logprobs(canaries), learner.logprobs(canaries)) > 100 * LIMIT  # the engine is behind the learner
        pool.load_folder(str(tmp_path / "exported"), 2)
        assert canary_mismatch(pool.logprobs(canaries), learner.logprobs(canaries)) < LIMIT
        check_push_between_two_tokens(pool, learner, prompts)
    return canaries


def check_adapters(spec: LearnerSpec, pool: VllmRolloutPool, prompts: list[Prompt], canaries: list[np.ndarray]) -> None:
    """Adapters are trained; from the second push on they are all that travels, and an engine that starts later has them too."""
    config = spec.config.model_copy(update={"lora": PolicyAdapterConfig(rank=2), "workers": WorkersConfig(cpus=0.5)})
    with learner_group(replace(spec, config=config), deadline_seconds=300) as learner:
        learner.ready()
        publisher = WeightPublisher(learner, pool, canaries, limit=LIMIT)
        whole = publisher.publish(4)
        before = pool.logprobs(canaries)
        assert canary_mismatch(before, [direct_logprobs(spec.policy_path, ids) for ids in canaries]) < LIMIT  # new adapters add nothing
        experience = experience_of(pool.submit(prompts, seed=1).result(), learner)
        assert float((experience.proximal_BT - experience.behaviour_BT).abs().max()) < LIMIT
        learner.update(config.make_algorithm().credit(experience, kl_coef=0.0), step=0)
        adapters = publisher.publish(5)
        assert adapters["push/canary_mismatch"] < LIMIT
        assert canary_mismatch(before, pool.logprobs(canaries)) > 100 * LIMIT
        assert adapters["push/share"] < 0.1 < 1 < whole["push/share"]
        check_replaced_engine(pool, learner, prompts, canaries, version=5)


def check_rollouts(pool: VllmRolloutPool, rollouts: list[Rollout], prompts: list[Prompt], policy: str) -> None:
    """In order, repeatable by seed, and with the log-probs of the model."""
    assert [rollout.prompt.id for rollout in rollouts] == [prompt.id for prompt in prompts]
    assert all((a.ids == b.ids).all() for a, b in zip(rollouts, pool.submit(prompts, seed=1).result(), strict=True))
    assert any(
        len(a.ids) != len(b.ids) or (a.ids != b.ids).any() for a, b in zip(rollouts, pool.submit(prompts, seed=2).result(), strict=True)
    )
    many = [Prompt(f"m{i}", "", np.full(60, 4 + i, np.int32)) for i in range(160)]  # more prompt tokens than fit in one pass
    assert len(pool.submit(many, seed=1).result()) == len(many)
    for rollout in rollouts[:2]:
        expected = direct_logprobs(policy, rollout.sequence)[len(rollout.prompt.ids) - 1 :]
        np.testing.assert_allclose(rollout.logprobs, expected, atol=LIMIT)


def check_push_between_two_tokens(pool: VllmRolloutPool, learner: RayLearner, prompts: list[Prompt]) -> None:
    """Unfinished responses go on under the new weights, and every token is labelled with the version that sampled it."""
    sampling = pool.submit(prompts * 40, seed=1)
    next(sampling.finished())  # more than fit into the engine at a time: the others are on their way
    pool.load(learner.pushed_policy(), 3)
    rollouts = sampling.result()
    assert {version for rollout in rollouts for version in rollout.versions.tolist()} == {2, 3}
    assert all((np.diff(rollout.versions) >= 0).all() for rollout in rollouts)
    assert any(rollout.versions[0] < rollout.versions[-1] for rollout in rollouts)


def check_replaced_engine(
    pool: VllmRolloutPool, learner: RayLearner, prompts: list[Prompt], canaries: list[np.ndarray], *, version: int
) -> None:
    """An engine killed while it samples costs nothing but time: its successor has the current weights and samples the same."""
    undisturbed = pool.submit(prompts, seed=4).result()
    sampling = pool.submit(prompts, seed=4)
    (process,) = pool.each("pid")
    os.kill(process, signal.SIGKILL)
    assert [rollout.ids.tolist() for rollout in sampling.result()] == [rollout.ids.tolist() for rollout in undisturbed]
    assert pool.each("pid") != [process]
    assert {rollout.policy_version for rollout in sampling.result()} == {version}
    assert canary_mismatch(pool.logprobs(canaries), learner.logprobs(canaries)) < LIMIT


def check_checkpoint(learner: RayLearner, experience: Experience, config: PpoConfig, canaries: list[np.ndarray], folder: Path) -> None:
    """After a restore the next update gives the same weights as it did before."""
    proximal_BT, values_BT = learner.inspect(experience.tokens)
    experience = replace(experience, proximal_BT=proximal_BT, values_BT=values_BT)
    credited = config.make_algorithm().credit(experience, kl_coef=0.0)
    learner.save(str(folder / "saved"))
    learner.load(str(folder / "saved"))  # lets go of the forward passes that `inspect` holds
    learner.update(credited, step=1)
    straight = learner.logprobs(canaries)
    learner.load(str(folder / "saved"))
    assert canary_mismatch(straight, learner.logprobs(canaries)) > 0
    learner.update(credited, step=1)
    assert canary_mismatch(straight, learner.logprobs(canaries)) == 0
    learner.load(str(folder / "saved"))
    learner.inspect(experience.tokens)  # with ppo.reuse_forward the update goes on from these forward passes
    learner.update(credited, step=1)
    assert canary_mismatch(straight, learner.logprobs(canaries)) < 1e-5
