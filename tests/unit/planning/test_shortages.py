"""What a plan says of what does not fit, and what would help."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.config.loading import load_recipe, with_values
from app.config.recipe import Recipe
from app.planning.hardware import MACHINES, Cluster, Machine, cluster_from_spec
from app.planning.plan import Plan, make_plan

PYTHIA = Path(__file__).resolve().parents[3] / "jobs" / "recipes" / "pythia"
PPO_12B = load_recipe(PYTHIA / "ppo-12b.toml")


def plan(recipe: Recipe, spec: str, command: str = "ppo") -> Plan:
    return make_plan(recipe, command, cluster_from_spec(spec))


def test_too_few_gpus_are_named() -> None:
    (shortage,) = plan(PPO_12B, "1x4xA100-80GB").as_dict()["shortages"]
    for part in ("stage ppo", "learner 5 of 6", "GPUs", "node 0: 0 whole GPUs"):
        assert part in shortage


def test_what_fills_a_gpu_is_named_with_what_would_help() -> None:
    big = with_values(load_recipe(PYTHIA / "sft-6.9b.toml"), {"sft.micro_batch_size": 8})
    (shortage,) = plan(big, "1x8xA100-80GB", "sft").as_dict()["shortages"]
    assert "activations" in shortage and "sft.deepspeed.gradient_checkpointing = true" in shortage
    assert plan(with_values(big, {"sft.deepspeed.gradient_checkpointing": True}), "1x8xA100-80GB", "sft").fits


def test_an_engine_too_large_for_its_share_is_named() -> None:
    small_share = with_values(PPO_12B, {"rollout.gpu_memory_utilization": 0.2})
    (shortage,) = plan(small_share, "1x8xA100-80GB").as_dict()["shortages"]
    assert "rollout.gpu_memory_utilization = 0.2" in shortage and "raise it" in shortage


def test_a_small_host_is_named() -> None:
    machine = MACHINES["p4de.24xlarge"]
    small = Cluster("small", (Machine("small", machine.cpus, 128 * 2**30, 8, machine.gpu),))
    (shortage,) = make_plan(PPO_12B, "ppo", small).as_dict()["shortages"]
    assert "node 0 host memory" in shortage and "more memory" in shortage


@pytest.mark.parametrize(
    ("command", "values", "advice", "none"),
    [
        ("sft", {"sft.micro_batch_size": 8}, ["gradient_checkpointing = true", "lower sft.micro_batch_size"], []),
        ("sft", {"sft.micro_batch_tokens": 2**14}, ["lower sft.micro_batch_tokens"], ["micro_batch_size"]),
        (
            "sft",
            {"sft.micro_batch_size": 8, "sft.deepspeed.gradient_checkpointing": True, "data.max_length": 16384},
            ["lower sft.micro_batch_size"],
            ["gradient_checkpointing"],
        ),
        (
            "serve",
            {"scoring.max_batch_tokens": 2**21, "scoring.reward.gpus": 1, "scoring.reference.gpus": 1},
            ["lower scoring.max_batch"],
            ["micro"],
        ),
        ("serve", {"reward.path": "x-70b", "scoring.reward.gpus": 1}, ["take GPUs with more memory"], ["zero_stage", "deepspeed"]),
    ],
)
def test_advice_is_about_the_role_and_not_yet_taken(command: str, values: dict[str, object], advice: list[str], none: list[str]) -> None:
    base = {"model.path": "pythia-6.9b", "reward.path": "pythia-1.4b", "model.precision": "bf16", "sft.workers.count": 8}
    base |= {"sft.workers.gpus": 1, "sft.batch_size": 64, "sft.deepspeed.zero_stage": 2, "data.max_length": 2048}
    found = plan(with_values(Recipe(), base | values), "1x8xA100-80GB", command)
    (text,) = found.as_dict()["shortages"]
    for part in advice:
        assert part in text
    for part in none:
        assert part not in text
