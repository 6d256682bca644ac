"""Whole plans: what is known to fit and not to fit, totals, remedies, time and cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.config.loading import load_recipe, with_values
from app.config.recipe import Recipe
from app.models.heads import ValueHead
from app.planning.hardware import GPUS, MACHINES, Cluster, Machine, cluster_from_spec
from app.planning.memory import Parts, total
from app.planning.plan import Plan, make_plan
from app.planning.roles import Roles
from app.planning.shapes import SHAPES
from app.planning.timing import Workload
from app.planning.trained import value_head

ROOT = Path(__file__).resolve().parents[3]
PYTHIA = ROOT / "jobs" / "recipes" / "pythia"
PPO_12B = load_recipe(PYTHIA / "ppo-12b.toml")
LAPTOP = Cluster("laptop", (Machine("laptop", 2, 24 * 2**30),))

FOUR_CORES = Cluster("four cores", (Machine("four cores", 4, 24 * 2**30),))


def plan(recipe: Recipe, spec: str, command: str = "ppo") -> Plan:
    return make_plan(recipe, command, cluster_from_spec(spec))


def test_open_assistants_set_up_needs_eight_gpus_of_80_gb() -> None:
    assert plan(PPO_12B, "1x8xA100-80GB").fits
    assert plan(PPO_12B, "1x8xH100-80GB").fits
    assert not plan(PPO_12B, "1x8xA100-40GB").fits
    assert not plan(PPO_12B, "1x4xA100-80GB").fits


def test_no_share_of_a_40_gb_gpu_holds_learner_and_engine_in_turns() -> None:
    shares = [with_values(PPO_12B, {"rollout.gpu_memory_utilization": share / 20}) for share in range(1, 20)]
    assert not any(plan(recipe, "1x8xA100-40GB").fits for recipe in shares)


def test_what_is_assumed_of_adapters_is_said() -> None:
    targets = with_values(PPO_12B, {"ppo.lora": {"targets": ["query_key_value", "q_proj"]}})
    (text,) = plan(targets, "1x8xA100-80GB").as_dict()["assumed"]
    assert "ppo.lora.targets" in text and "q_proj" in text and "query_key_value" not in text
    assert plan(targets, "1x8xA100-80GB", "serve").assumed == plan(PPO_12B, "1x8xA100-80GB").assumed == ()


def test_without_places_there_is_no_end() -> None:
    recipe = with_values(PPO_12B, {"sft.max_steps": 10, "rm.max_steps": 10, "sft.workers.gpus": 1, "rm.workers.gpus": 1})
    assert plan(recipe, "1x4xA100-80GB", "pipeline").seconds is None
    assert plan(recipe, "1x8xA100-80GB", "pipeline").seconds is not None


def test_a_value_head_takes_the_place_of_a_second_model() -> None:
    """Its parameters are those of the real one, and are trained with the policy; nothing else of a critic is there."""
    head = ValueHead(12, seed=0)
    assert value_head(replace(SHAPES["pythia-70m"], hidden=12)) == sum(parameter.numel() for parameter in head.parameters())
    policy, reward = SHAPES["pythia-12b"], SHAPES["pythia-1.4b"]
    learners = [Roles(with_values(PPO_12B, {"ppo.critic_model": model})).learner() for model in ("reward_model", "value_head")]
    two, one = (learner.working["weights"] / 2 for learner in learners)
    assert (two, one) == (policy.parameters + reward.trunk, policy.parameters + value_head(policy))
    times = [plan(with_values(PPO_12B, {"ppo.critic_model": model}), "1x8xA100-80GB") for model in ("reward_model", "value_head")]
    updates = [times.stages[0].timing.phases["update"] for times in times if times.stages[0].timing]
    assert updates[1] < updates[0]


def test_texts_beside_the_rollouts_take_time_and_room() -> None:
    values = {"ppo.pretraining.path": "texts", "ppo.pretraining.coef": 1.0, "ppo.pretraining.batch_size": 96}  # of data.max_length = 512
    mixed = with_values(PPO_12B, values)
    (without,), (found,) = plan(PPO_12B, "1x8xA100-80GB").stages, plan(mixed, "1x8xA100-80GB").stages
    assert without.timing is not None and found.timing is not None
    assert found.timing.phases["update"] > 1.3 * without.timing.phases["update"]
    short = [Roles(with_values(recipe, {"rollout.max_new_tokens": 8})).learner() for recipe in (PPO_12B, mixed)]
    assert short[1].working["logits"] > 10 * short[0].working["logits"]


def test_a_lone_worker_in_float32_holds_what_zero_0_does() -> None:
    """The engine makes ZeRO 1 and 2 that: no second float32 copy of the weights, no buckets."""
    recipe = load_recipe(ROOT / "jobs" / "recipes" / "smollm2" / "sft.toml")
    assert recipe.sft.deepspeed.zero_stage == 1 and recipe.sft.workers.count == 1

    def planned(stage: str, **values: object) -> Parts:
        (found,) = make_plan(with_values(recipe, {key.replace("__", "."): value for key, value in values.items()}), stage, LAPTOP).stages
        return found.stage.roles[0].working

    parts, weights = planned("sft"), 4 * SHAPES["smollm2-135m"].parameters
    assert parts == planned("sft", sft__deepspeed__zero_stage=0)
    assert (parts["weights"], parts["gradients"], parts["optimizer"]) == (weights, weights, 2 * weights)
    assert parts["buffers"] <= 2 * 4 * SHAPES["smollm2-135m"].embedding
    assert planned("sft", sft__deepspeed__zero_stage=3)["optimizer"] == 3 * weights
    assert planned("sft", sft__workers__count=2)["optimizer"] == 1.5 * weights
    assert planned("ppo")["optimizer"] == planned("ppo", ppo__deepspeed__zero_stage=0)["optimizer"]


RUNS = {"ppo-12b": "ppo", "sft-12b": "sft", "sft-6.9b": "sft", "sft-70m": "sft", "rm-1.4b": "rm", "rm-6.9b": "rm"}


@pytest.mark.parametrize("name", RUNS)
def test_every_pythia_recipe_fits_the_machine_it_is_written_for(name: str) -> None:
    found = plan(load_recipe(PYTHIA / f"{name}.toml"), "1x8xA100-80GB", RUNS[name]).as_dict()
    assert found["shortages"] == []


@pytest.mark.parametrize("name", ["tiny/pipeline", "smollm2/sft", "smollm2/rm", "smollm2/ppo"])
def test_cpu_recipes_fit_a_laptop(name: str) -> None:
    assert make_plan(load_recipe(ROOT / "jobs" / "recipes" / f"{name}.toml"), Path(name).name, LAPTOP).fits


def test_a_measured_cpu_run_is_within_a_fifth_in_memory_and_a_factor_of_two_in_time() -> None:
    (stage,) = make_plan(load_recipe(ROOT / "jobs" / "recipes" / "smollm2" / "ppo.toml"), "ppo", LAPTOP).stages
    assert stage.timing is not None
    assert 0.8 < stage.devices[0].used / (18.1 * 2**30) < 1.2  # docs/results/smollm2.md
    assert 0.5 < stage.timing.seconds_per_step / 43.9 < 2


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(list(RUNS)),
    st.integers(1, 4),
    st.sampled_from([8, 16]),
    st.sampled_from(list(GPUS)),
)
def test_parts_add_up_and_fitting_means_no_shortage(name: str, nodes: int, gpus: int, kind: str) -> None:
    found = plan(load_recipe(PYTHIA / f"{name}.toml"), f"{nodes}x{gpus}x{kind}", RUNS[name])
    document = found.as_dict()
    for stage in document["stages"]:
        for device in stage["devices"]:
            assert device["bytes"] == sum(sum(parts.values()) for parts in device["parts"].values())
        for role in stage["roles"]:
            assert role["bytes"] == sum(role["parts"].values())
            assert len(role["slots"]) == role["count"]
    fits = all(device["bytes"] <= device["capacity"] for stage in document["stages"] for device in stage["devices"])
    assert document["fits"] is (not document["shortages"])
    assert not document["fits"] or fits


def test_faster_machines_take_less_time_and_longer_answers_more() -> None:
    def seconds(recipe: Recipe, spec: str, workload: Workload | None = None) -> float:
        found: float = make_plan(recipe, "ppo", cluster_from_spec(spec), workload).as_dict()["seconds_per_step"]
        return found

    assert seconds(PPO_12B, "1x8xH100-80GB") < seconds(PPO_12B, "1x8xA100-80GB")
    assert seconds(PPO_12B, "1x8xA100-80GB", Workload(mean_length=128)) < seconds(PPO_12B, "1x8xA100-80GB")
    wide = with_values(PPO_12B, {"ppo.epochs": 8})
    assert seconds(wide, "1x8xA100-80GB") > seconds(PPO_12B, "1x8xA100-80GB")


def test_an_algorithm_without_a_critic_updates_in_half_the_time() -> None:
    def phases(name: str) -> Mapping[str, float]:
        recipe = with_values(
            PPO_12B, {"reward.path": None, "ppo.algorithm.name": name, "ppo.samples_per_prompt": 2, "ppo.critic_model": "reward_model"}
        )
        (stage,) = plan(recipe, "1x8xA100-80GB").stages
        assert stage.timing is not None
        return stage.timing.phases

    with_critic = phases("ppo")
    for name in ("grpo", "rloo", "reinforce_pp"):
        without = phases(name)
        for phase in ("update", "communication", "host_adam"):  # the critic, of the policy's size, is half of it
            assert without[phase] == pytest.approx(with_critic[phase] / 2, rel=0.05), (name, phase)
        assert without["rollout"] == with_critic["rollout"] and without["push"] == with_critic["push"]


def test_cost_is_price_times_time() -> None:
    found = plan(PPO_12B, "2x8xA100-80GB").as_dict()
    assert found["price_per_hour"] == pytest.approx(2 * 27.44705)
    assert found["prices_read"] == "2025-12-21"
    assert found["cost"] == pytest.approx(156 * found["seconds_per_step"] / 3600 * 2 * 27.44705)
    assert found["cost_per_step"] == pytest.approx(found["cost"] / 156)


def test_no_price_no_cost_and_no_rows_no_end() -> None:
    found = plan(load_recipe(PYTHIA / "sft-12b.toml"), "1x8xL4-24GB", "sft").as_dict()
    assert (found["price_per_hour"], found["cost_per_step"], found["seconds"], found["cost"]) == (None, None, None, None)
    with_rows = make_plan(load_recipe(PYTHIA / "sft-12b.toml"), "sft", cluster_from_spec("1x8xA100-80GB"), Workload(rows=6400))
    assert with_rows.stages[0].timing is not None and with_rows.stages[0].timing.steps == 800


def test_ranks_on_several_nodes_talk_through_the_network() -> None:
    recipe = load_recipe(PYTHIA / "sft-12b.toml")
    together, apart = (plan(recipe, spec, "sft").stages[0].timing for spec in ("1x8xA100-80GB", "2x4xA100-80GB"))
    assert together is not None and apart is not None
    assert apart.phases["communication"] > 10 * together.phases["communication"]


def test_a_model_of_unknown_size_gets_places_but_no_times() -> None:
    found = make_plan(with_values(Recipe(), {"model.path": "runs/mine/sft/model", "reward.path": "runs/mine/rm/model"}), "ppo", FOUR_CORES)
    assert found.fits and found.as_dict()["seconds_per_step"] is None


def test_a_cluster_that_grows_grows_no_further_than_it_has_to() -> None:
    machines = [MACHINES[name] for name in ("m6i.4xlarge", *["p4de.24xlarge"] * 4)]
    one = make_plan(PPO_12B, "ppo", Cluster("file", tuple(machines), elastic=True))
    assert len(one.cluster.nodes) == 2 and one.price == pytest.approx(0.768 + 27.44705)
    apart = make_plan(with_values(PPO_12B, {"rollout.colocate": False}), "ppo", Cluster("file", tuple(machines), elastic=True))
    assert len(apart.cluster.nodes) == 3 and apart.fits
    assert not make_plan(PPO_12B, "ppo", Cluster("file", tuple(machines[:1]), elastic=True)).fits


def test_bytes_are_those_of_one_process_at_its_peak() -> None:
    found = plan(PPO_12B, "1x8xA100-80GB")
    document = found.as_dict()
    assert document["bytes"] == {role.name: total(role.working) for role in found.stages[0].stage.roles}
    assert set(document["bytes"]) == {"learner", "engine", "reward", "reference"}
