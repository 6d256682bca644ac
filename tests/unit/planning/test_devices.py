"""What GPUs hold at their fullest: who works at the same time, and what vLLM reserves."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.config.loading import load_recipe, with_values
from app.config.recipe import Recipe
from app.planning.devices import CONTEXT
from app.planning.hardware import GPUS, cluster_from_spec
from app.planning.memory import total
from app.planning.plan import Plan, make_plan
from app.planning.roles import Roles

SMOLLM2 = load_recipe(Path(__file__).resolve().parents[3] / "jobs" / "recipes" / "smollm2" / "ppo.toml")
SHARED_GPU = {"ppo.workers.gpus": 0.4, "rollout.engines.gpus": 0.4, "scoring.reward.gpus": 0.1, "scoring.reference.gpus": 0.1}


def plan(recipe: Recipe, spec: str, command: str = "ppo") -> Plan:
    return make_plan(recipe, command, cluster_from_spec(spec))


def test_overlapping_roles_do_not_take_turns() -> None:
    """Engine and scorers that are a batch ahead work while the learner does: the GPU that they share holds what all of them work with."""
    values = {"model.precision": "bf16", "rollout.gpu_memory_utilization": 0.4, "rollout.transfer": "object_store", **SHARED_GPU}
    recipe = with_values(SMOLLM2, values)

    def at_work(max_lag: int) -> set[str]:
        (stage,) = plan(with_values(recipe, {"ppo.max_lag": max_lag}), "1x1xL4-24GB").stages
        assert stage.fits
        return {role for role, parts in stage.devices[0].parts.items() if "activations" in parts}

    assert at_work(0) == {"learner", "engine"}  # whose memory is reserved at all times
    assert at_work(1) == {"learner", "engine", "reward", "reference"}


@pytest.mark.parametrize(("colocate", "max_lag"), [(False, 0), (False, 1), (True, 0)])
def test_every_process_on_a_gpu_has_one_context_whoever_works(colocate: bool, max_lag: int) -> None:
    """vLLM measures what is free after its own context is there, and takes its share of the whole GPU beside it."""
    base = {
        "model.precision": "bf16",
        "rollout.colocate": colocate,
        "ppo.max_lag": max_lag,
        "rollout.transfer": "object_store",
        **SHARED_GPU,
    }
    for share, rows in ((0.9, 1), (0.3, 16)):  # the engine's turn is the fullest, or the learner's
        values = base | {"rollout.gpu_memory_utilization": share, "ppo.micro_batch_size": rows}
        recipe = with_values(SMOLLM2, values)
        (stage,) = plan(recipe, "1x1xA100-80GB").stages
        parts = stage.devices[0].parts
        assert {name: held["context"] for name, held in parts.items()} == dict.fromkeys(parts, CONTEXT)
        assert len(parts) == 4


def test_learner_and_scorers_judge_at_the_same_time() -> None:
    """With ppo.reuse_forward the learner holds most while reward model and reference still work."""
    values = {
        "model.precision": "bf16",
        "rollout.colocate": True,
        "ppo.reuse_forward": True,
        "ppo.micro_batch_size": 1,
        "ppo.batch_size": 64,
    }
    values |= {"scoring.max_batch_tokens": 2**18}
    recipe = with_values(SMOLLM2, values | SHARED_GPU)
    (stage,) = plan(recipe, "1x1xA100-80GB").stages
    roles, parts = {role.name: role for role in stage.stage.roles}, stage.devices[0].parts
    assert total(roles["learner"].judging) > 0.8 * total(roles["learner"].working)
    for name in ("reward", "reference"):
        assert total(parts[name]) == total(roles[name].working) + CONTEXT
    again = Roles(with_values(recipe, {"ppo.reuse_forward": False})).learner()
    assert total(again.resting) < total(again.judging) < 0.6 * total(again.working)  # no pass is kept, one is judged at a time


def test_everything_on_one_gpu_in_turns() -> None:
    values = {
        "model.precision": "bf16",
        "ppo.workers.gpus": 0.4,
        "rollout.engines.gpus": 0.4,
        "rollout.colocate": True,
        "rollout.gpu_memory_utilization": 0.4,
        "scoring.reward.gpus": 0.1,
        "scoring.reference.gpus": 0.1,
    }
    recipe = with_values(SMOLLM2, values)
    (stage,) = plan(recipe, "1x1xL4-24GB").stages
    assert {slot.gpus for slot in stage.slots} == {(0,)}
    assert stage.fits and [device.name for device in stage.devices] == ["node 0 GPU 0", "node 0 host memory"]
    greedy = with_values(recipe, {"scoring.reward.gpus": 0.2})
    (shortage,) = plan(greedy, "1x1xL4-24GB").stages[0].shortages
    assert "reference 1 of 1 needs 0.1 GPU" in shortage


def test_engines_to_chat_with_fill_their_share_of_a_gpu() -> None:
    chat = {"path": "llama-7b", "workers": {"gpus": 1.0}, "gpu_memory_utilization": 0.7}
    recipe = with_values(Recipe(), {"model.precision": "bf16", "serving.chat": {"bot": chat}})
    (stage,) = plan(recipe, "1x1xA100-80GB", "serve").stages
    assert total(stage.stage.roles[0].working) == pytest.approx(0.7 * GPUS["A100-80GB"].memory)
    small = with_values(recipe, {"serving.chat": {"bot": chat | {"gpu_memory_utilization": 0.1}}})
    shortages = plan(small, "1x1xA100-80GB", "serve").stages[0].shortages
    assert any("serving.chat.bot.gpu_memory_utilization = 0.1" in text for text in shortages)
