"""What follows from the rollout keys about GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from app.config.loading import load_recipe
from app.config.recipe import Recipe
from app.config.rollout import RolloutConfig
from app.config.shared import WorkersConfig


@pytest.mark.parametrize(
    ("transfer", "gpus", "colocate", "chosen", "shares_gpus"),
    [
        ("auto", 0, False, "object_store", False),
        ("auto", 1, False, "nccl", False),
        ("auto", 0.5, False, "object_store", False),  # the rest of it may be the learner's, or another engine's
        ("auto", 1, True, "object_store", True),
        ("auto", 0, True, "object_store", False),
        ("object_store", 1, False, "object_store", False),
        ("nccl", 1, False, "nccl", False),
        ("ipc", 0.5, True, "ipc", True),
    ],
)
def test_weights_go_over_nccl_to_engines_that_own_their_gpus(
    transfer: str, gpus: float, colocate: bool, chosen: str, shares_gpus: bool
) -> None:
    config = RolloutConfig.model_validate({"transfer": transfer, "engines": {"gpus": gpus}, "colocate": colocate})
    assert (config.chosen_transfer, config.shares_gpus) == (chosen, shares_gpus)


@pytest.mark.parametrize("given", [{}, {"engines": {"gpus": 1}}, {"colocate": True}])
def test_the_memory_of_a_gpu_is_handed_over_only_where_it_is_shared(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"set rollout\.colocate = true and rollout\.engines\.gpus"):
        RolloutConfig.model_validate({"transfer": "ipc", **given})


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({}, "rollout.engines.gpus = 0"),
        ({"engines": {"gpus": 0.5}}, "rollout.engines.gpus = 0.5"),
        ({"engines": {"gpus": 1}, "colocate": True}, "rollout.colocate = true"),
    ],
)
def test_nccl_is_refused_where_an_engine_has_no_gpu_of_its_own(given: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=f'{reason} does not give: set rollout.transfer = "auto"'):
        RolloutConfig.model_validate({"transfer": "nccl", **given})


def test_learner_and_engine_on_one_gpu_are_in_no_group_of_nccl() -> None:
    recipe = load_recipe(Path(__file__).parents[3] / "jobs" / "recipes" / "smollm2" / "pipeline-one-gpu.toml")
    assert recipe.ppo.workers.gpus + recipe.rollout.engines.gpus <= 1 and recipe.rollout.chosen_transfer == "object_store"


@pytest.mark.parametrize(("gpus", "parallel"), [(0, 1), (0.5, 1), (1, 1), (4, 4)])
def test_an_engine_splits_its_model_over_its_whole_gpus(gpus: float, parallel: int) -> None:
    assert WorkersConfig(gpus=gpus).tensor_parallel == parallel


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"sft": {"workers": {"count": 2, "gpus": 0.5}}}, r"sft.workers.gpus = 0.5: 2 ranks would come onto one GPU"),
        ({"rm": {"workers": {"gpus": 2}}}, r"rm.workers.gpus = 2: a rank computes on one GPU"),
        ({"ppo": {"workers": {"gpus": 1.5}}}, r"whole GPUs or a part of one"),
        ({"rollout": {"engines": {"gpus": 2.5}}}, r"whole GPUs or a part of one"),
        (
            {"ppo": {"workers": {"count": 2, "gpus": 0.25}}, "rollout": {"colocate": True, "engines": {"gpus": 0.25}}},
            r"ppo.workers.gpus = 0.25 and its engine 0.25: 2 ranks",
        ),
    ],
)
def test_gpus_that_ray_or_nccl_would_refuse(given: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        Recipe.model_validate(given)


@pytest.mark.parametrize(
    "given",
    [
        {"sft": {"workers": {"count": 2, "gpus": 0.6}}},  # two of them do not fit onto one
        {"rm": {"workers": {"gpus": 0.1}}},
        {"ppo": {"workers": {"count": 2, "gpus": 0.5}}, "rollout": {"colocate": True, "engines": {"gpus": 0.5}}},
        {"rollout": {"engines": {"count": 2, "gpus": 0.25}}},  # engines are in no group
        {"rollout": {"engines": {"gpus": 4}}},
    ],
)
def test_gpus_that_ranks_and_engines_can_have(given: dict[str, Any]) -> None:
    Recipe.model_validate(given)


@pytest.mark.parametrize(("temperature", "allowed"), [(0.01, True), (0.0099, False), (0.0, False)])
def test_no_temperature_below_that_at_which_engines_sample(temperature: float, allowed: bool) -> None:
    """vLLM takes 0.01 in place of any lower one, without an error, while the learner would divide by what was asked for."""
    if allowed:
        assert RolloutConfig(temperature=temperature).temperature == temperature
        return
    with pytest.raises(ValidationError, match=r"temperature\n.*greater than or equal to 0\.01"):
        RolloutConfig(temperature=temperature)
