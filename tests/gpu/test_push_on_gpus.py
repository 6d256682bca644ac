"""New weights reach engines on GPUs by every way there is, and engines and learners that share a GPU take turns on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.config.recipe import Recipe
from app.experience import Prompt
from app.models.heads import init_reward_model, save_reward_model
from app.models.load import load_tokenizer
from app.stages.ppo import open_pool, start_learner, weight_publisher
from app.workers.shared_gpus import shared_gpus
from app.workers.weight_publisher import canaries_of, canary_mismatch
from tests.inspected_rollouts import experience_of
from tests.tiny_models import VOCABULARY, make_llama, make_neox

OPTIMIZER = {"lr": 1e-2, "eps": 1e-5}
APART = {"ppo": {"workers": {"gpus": 1}}, "rollout": {"engines": {"gpus": 1}}}
SHARED = {"ppo": {"workers": {"gpus": 0.5}}, "rollout": {"engines": {"gpus": 0.5}, "colocate": True}}
WAYS: dict[str, tuple[int, dict[str, Any], str]] = {
    "fractions, object store": (1, {"ppo": {"workers": {"gpus": 0.4}}, "rollout": {"engines": {"gpus": 0.4}}}, "object_store"),
    "shared, object store": (1, SHARED, "object_store"),
    "shared, ipc": (1, SHARED, "ipc"),
    "apart, object store": (2, APART, "object_store"),
    "apart, nccl": (2, APART, "nccl"),
    "two ranks, nccl": (3, {**APART, "ppo": {"workers": {"count": 2, "gpus": 1}}}, "nccl"),
    "two GPUs an engine, nccl": (3, {**APART, "rollout": {"engines": {"gpus": 2}}}, "nccl"),
    "two GPUs an engine, object store": (3, {**APART, "rollout": {"engines": {"gpus": 2}}}, "object_store"),
}


def recipe_of(given: dict[str, Any], transfer: str, zero_stage: int) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"precision": "fp32"},
            "run": {"deadline_seconds": 300},
            "ppo": {
                "batch_size": 8,
                "epochs": 1,
                "micro_batch_size": 2,
                "reuse_forward": zero_stage < 3,
                "max_logprob_mismatch": 1e-2,
                "policy": OPTIMIZER,
                "critic": OPTIMIZER,
                "deepspeed": {"zero_stage": zero_stage},
                **given["ppo"],
            },
            "rollout": {"max_new_tokens": 12, "kv_cache_gib": 0.1, "enforce_eager": True, "transfer": transfer, **given["rollout"]},
        }
    )


def check_push(recipe: Recipe, policy: str, folder: Path) -> None:
    """Three steps: before each, engine and learner agree on what was sampled; after it, the engine holds what the step has made."""
    reward, limit = str(folder / "reward"), recipe.ppo.max_logprob_mismatch
    save_reward_model(init_reward_model(policy, seed=0), load_tokenizer(policy), reward, reward_offset=0.5)
    rng = np.random.default_rng(0)
    prompts = [Prompt(str(i), "", rng.integers(4, VOCABULARY, size=5 + i, dtype=np.int32)) for i in range(8)]
    algorithm = recipe.ppo.make_algorithm()
    with (
        shared_gpus(recipe) as placed,
        open_pool(placed.recipe, policy, prompts, 1, placed.engines) as pool,
        start_learner(placed.recipe, policy, reward, placed.learners) as learner,
    ):
        pool.ready()
        learner.ready()
        canaries = canaries_of(pool.submit(prompts, seed=1).result())
        publisher = weight_publisher(placed.recipe, learner, pool, canaries)
        for step in range(3):
            rollouts = pool.submit(prompts, seed=step).result()
            assert {rollout.policy_version for rollout in rollouts} == {step}
            experience = experience_of(rollouts, learner)
            assert float((experience.proximal_BT - experience.behaviour_BT).abs().max()) < limit
            before = pool.logprobs(canaries)
            learner.update(algorithm.credit(experience, kl_coef=0.0), step=step)
            publisher.publish(step + 1)  # raises where a canary shows other weights
            assert canary_mismatch(before, pool.logprobs(canaries)) > 10 * limit


@pytest.mark.parametrize(("make", "zero_stage"), [(make_neox, 0), (make_llama, 3)], ids=["untied-zero0", "tied-zero3"])
@pytest.mark.parametrize(("needed", "given", "transfer"), WAYS.values(), ids=WAYS)
def test_push(needed: int, given: dict[str, Any], transfer: str, make: Any, zero_stage: int, gpus: int, tmp_path: Path) -> None:
    if gpus < needed:
        pytest.skip(f"needs {needed} GPUs, there are {gpus}")
    check_push(recipe_of(given, transfer, zero_stage), make(tmp_path / "policy"), tmp_path)
