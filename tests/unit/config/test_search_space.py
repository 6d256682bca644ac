"""Search spaces: drawing, grids, conditions, and what is refused before anything starts."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import optuna
import pytest
from pydantic import ValidationError

from app.config.loading import load_recipe
from app.config.search_space import clipped, draw, grid, points, suggest
from app.config.tune import TuneConfig
from app.errors import ConfigError

CONDITIONAL = {
    "ppo.algorithm.ppo.value_clip": {"type": "uniform", "low": 0.1, "high": 0.3, "when": {"ppo.algorithm.name": "ppo"}},
    "ppo.samples_per_prompt": {"type": "choice", "values": [4, 8], "when": {"ppo.algorithm.name": ["grpo", "rloo"]}},
    "ppo.algorithm.name": {"type": "choice", "values": ["ppo", "grpo", "rloo"]},
}


def space(domains: dict[str, Any]) -> Any:
    return TuneConfig(space=domains).space


def refusal(tmp_path: Path, domains: dict[str, Any], *overrides: str) -> str:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("".join(f'tune.space."{name}" = {toml(domain)}\n' for name, domain in domains.items()))
    with pytest.raises(ConfigError) as error:
        load_recipe(recipe, overrides)
    return str(error.value)


def toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml(inner)}" for key, inner in value.items()) + "}"
    return "[" + ", ".join(map(toml, value)) + "]" if isinstance(value, list) else json.dumps(value)


def test_the_same_seed_draws_the_same_inside_the_ranges() -> None:
    domains = space(
        {
            "ppo.policy.lr": {"type": "loguniform", "low": 1e-6, "high": 1e-4},
            "ppo.kl.coef": {"type": "uniform", "low": 0.0, "high": 0.2},
            "ppo.epochs": {"type": "int", "low": 1, "high": 4},
            "ppo.batch_size": {"type": "int", "low": 16, "high": 64, "log": True},
        }
    )
    drawn = [draw(domains, rng) for rng in [random.Random(1)] for _ in range(400)]
    assert drawn == [draw(domains, rng) for rng in [random.Random(1)] for _ in range(400)]
    assert all(1e-6 <= values["ppo.policy.lr"] <= 1e-4 and 0 <= values["ppo.kl.coef"] <= 0.2 for values in drawn)
    assert 150 < sum(values["ppo.policy.lr"] < 1e-5 for values in drawn) < 250  # half of them below the middle in the logarithm
    assert set(Counter(values["ppo.epochs"] for values in drawn)) == {1, 2, 3, 4}
    sizes = [values["ppo.batch_size"] for values in drawn]
    assert min(sizes) >= 16 and max(sizes) <= 64 and 150 < sum(size < 32 for size in sizes) < 250


def test_conditional_keys_are_drawn_only_under_their_condition() -> None:
    drawn = [draw(space(CONDITIONAL), random.Random(seed)) for seed in range(60)]
    for values in drawn:
        chosen = values["ppo.algorithm.name"]
        assert ("ppo.algorithm.ppo.value_clip" in values) == (chosen == "ppo")
        assert ("ppo.samples_per_prompt" in values) == (chosen != "ppo")
    assert len({values["ppo.algorithm.name"] for values in drawn}) == 3


def test_a_grid_has_every_combination_once() -> None:
    domains = space(
        {
            "ppo.epochs": {"type": "int", "low": 1, "high": 2, "when": {"ppo.algorithm.name": "ppo"}},
            "ppo.algorithm.name": {"type": "grid", "values": ["ppo", "grpo"]},
        }
    )
    assert grid(domains) == [
        {"ppo.algorithm.name": "ppo", "ppo.epochs": 1},
        {"ppo.algorithm.name": "ppo", "ppo.epochs": 2},
        {"ppo.algorithm.name": "grpo"},
    ]


def test_optuna_is_asked_for_the_keys_whose_conditions_hold() -> None:
    fixed = optuna.trial.FixedTrial({"ppo.algorithm.name": "grpo", "ppo.samples_per_prompt": 8})
    assert suggest(space(CONDITIONAL), fixed) == {"ppo.algorithm.name": "grpo", "ppo.samples_per_prompt": 8}


def test_what_a_population_perturbs_stays_in_its_range() -> None:
    domains = space({"ppo.epochs": {"type": "int", "low": 1, "high": 4}, "ppo.kl.coef": {"type": "uniform", "low": 0.1, "high": 0.2}})
    assert clipped(domains, {"ppo.epochs": 4.8, "ppo.kl.coef": 0.08}) == {"ppo.epochs": 4, "ppo.kl.coef": 0.1}


def test_a_conditional_space_over_algorithms_is_accepted(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("".join(f'tune.space."{name}" = {toml(domain)}\n' for name, domain in CONDITIONAL.items()))
    assert load_recipe(recipe).tune.space.keys() == CONDITIONAL.keys()


@pytest.mark.parametrize(
    ("domains", "overrides", "parts"),
    [
        ({"ppo.kl.cof": {"type": "choice", "values": [0.1]}}, (), ["unknown key ppo.kl.cof", "did you mean ppo.kl.coef?"]),
        ({"ppo.kl.coef": {"type": "uniform", "low": 0.2, "high": 0.1}}, (), ["empty range"]),
        ({"ppo.epochs": {"type": "int", "low": 3, "high": 2}}, (), ["empty range"]),
        ({"ppo.kl.coef": {"type": "choice", "values": []}}, (), ["at least 1 item"]),
        ({"ppo.policy.lr": {"type": "uniform", "low": -1.0, "high": 1.0}}, (), ["ppo.policy.lr = -1.0", "greater than 0"]),
        ({"ppo.epochs": {"type": "uniform", "low": 1.5, "high": 2.5}}, (), ["ppo.epochs = 1.5", "valid integer"]),
        ({"ppo.policy.lr": {"type": "uniform", "low": 1e-6, "high": 1e-5, "when": {"ppo.epochs": 1}}}, (), ["not in the space"]),
        (
            {
                "ppo.policy.lr": {"type": "uniform", "low": 1e-6, "high": 1e-5, "when": {"ppo.epochs": 9}},
                "ppo.epochs": {"type": "int", "low": 1, "high": 4},
            },
            (),
            ["ppo.epochs = 9", "never takes"],
        ),
        (
            {
                "ppo.minibatches": {"type": "choice", "values": [1], "when": {"ppo.epochs": 1}},
                "ppo.epochs": {"type": "choice", "values": [1], "when": {"ppo.minibatches": 1}},
            },
            (),
            ["in a circle"],
        ),
        (
            {"ppo.kl.coef": {"type": "uniform", "low": 0.1, "high": 0.2}},
            ("--tune.searcher=grid",),
            ["ppo.kl.coef has a continuous range", "type = grid"],
        ),
        ({"ppo.kl.coef": {"type": "grid", "values": [0.1, 0.2]}}, (), ["set tune.searcher = grid"]),
        ({"ppo.epochs": {"type": "int", "low": 1, "high": 9}}, ("--tune.searcher=grid",), ["9 points", "set tune.trials = 9"]),
        ({"model.path": {"type": "choice", "values": ["a", "b"]}}, (), ["model.path is the same for all trials"]),
        ({"rollout.temperature": {"type": "uniform", "low": 0.5, "high": 1.0}}, (), ["the same for all trials"]),
        (
            {"ppo.epochs": {"type": "choice", "values": [1, 2]}},
            ("--tune.scheduler=pb2",),
            ["pb2 works on ranges", "or pbt"],
        ),
        (
            {"ppo.algorithm.name": {"type": "choice", "values": ["ppo", "reinforce_pp"]}},
            ("--tune.scheduler=pbt",),
            ["pbt copies checkpoints", "ppo.algorithm.name"],
        ),
        *(
            (
                {name: {"type": "choice", "values": values}},
                ("--tune.scheduler=pbt", *more),
                ["pbt copies checkpoints", name, "leave it out"],
            )
            for name, values, more in (
                ("ppo.critic_model", ["reward_model", "value_head"], ()),
                ("ppo.freeze_layers", [0, 1], ()),
                ("ppo.lora", [{"rank": 4}, {"rank": 8}], ()),
                ("ppo.lora.rank", [4, 8], ("--ppo.lora.rank=4",)),
                ("ppo.lora.alpha", [4, 8], ("--ppo.lora.rank=4",)),
                ("ppo.reward.delta", [True, False], ("--ppo.reward.scale=running",)),
                ("ppo.reward.scale", ["running", "reference"], ()),
            )
        ),
        *(
            (
                {name: {"type": "choice", "values": values}, **more},
                ("--tune.scheduler=pbt", "--ppo.max_lag=1", *given),
                ["pbt copies checkpoints", "ppo.carry_over", f"leave {name} or ppo.carry_over out"],
            )
            for name, values, more, given in (
                ("ppo.batch_size", [16, 64], {}, ("--ppo.carry_over=0.5",)),
                ("ppo.samples_per_prompt", [1, 8], {}, ("--ppo.carry_over=0.5",)),
                ("ppo.batch_size", [16, 64], {"ppo.carry_over": {"type": "uniform", "low": 0.1, "high": 0.5}}, ()),
            )
        ),
        (
            {"ppo.epochs": {"type": "int", "low": 1, "high": 2}},
            ("--tune.scheduler=pbt", "--tune.perturb_every=4", "--ppo.steps=4"),
            ["tune.perturb_every = 4", "ppo.steps = 4", "set tune.perturb_every = 3 or less"],
        ),
        (
            {"ppo.epochs": {"type": "int", "low": 1, "high": 2}},
            ("--tune.scheduler=pb2", "--tune.perturb_every=4", "--ppo.steps=8"),
            ["tune.perturb_every = 4", "ppo.steps = 8", "set tune.perturb_every = 3 or less"],
        ),
        (
            {"ppo.epochs": {"type": "int", "low": 1, "high": 2}},
            ("--tune.scheduler=pbt", "--tune.perturb_every=1", "--ppo.steps=1"),
            ["set ppo.steps = 2 or more"],
        ),
        (
            {"ppo.epochs": {"type": "int", "low": 1, "high": 2}},
            ("--tune.scheduler=pbt", "--tune.searcher=optuna"),
            ["set tune.searcher = random"],
        ),
        ({"ppo.epochs": {"type": "int", "low": 1, "high": 2}}, ("--tune.multi_objective=true",), ["set tune.searcher = optuna"]),
    ],
)
def test_refused_before_anything_starts(tmp_path: Path, domains: dict[str, Any], overrides: tuple[str, ...], parts: list[str]) -> None:
    message = refusal(tmp_path, domains, *overrides)
    assert all(part in message for part in parts), message


def test_a_loguniform_range_is_above_zero() -> None:
    with pytest.raises(ValidationError, match="empty range"):
        space({"ppo.kl.coef": {"type": "loguniform", "low": 0.0, "high": 0.1}})


CLASHING = {"ppo.batch_size": {"type": "choice", "values": [96, 64]}, "ppo.minibatches": {"type": "choice", "values": [4, 3]}}
"""64 rollouts do not make 3 minibatches; each value goes with the first of the other key."""
EIGHT = ("--ppo.micro_batch_size=8",)
DIVISORS = {"ppo.micro_batch_size": {"type": "int", "low": 2, "high": 12}}
"""Of a batch of 96; both ends of the range are."""


@pytest.mark.parametrize(
    ("domains", "overrides", "parts"),
    [
        (CLASHING, (*EIGHT, "--tune.searcher=grid"), ["trial 4 of 4", "ppo.batch_size = 64", "ppo.minibatches = 3", "no multiple"]),
        (CLASHING, (*EIGHT, "--tune.trials=16"), ["of 16", "ppo.batch_size = 64", "ppo.minibatches = 3", "no multiple"]),
        (CLASHING, (*EIGHT, "--tune.searcher=optuna"), ["may be drawn", "ppo.batch_size = 64", "ppo.minibatches = 3", "no multiple"]),
        (DIVISORS, ("--ppo.batch_size=96", "--tune.trials=16"), ["of 16", "ppo.micro_batch_size = ", "choose a divisor of 96"]),
        (DIVISORS, ("--ppo.batch_size=96", "--tune.searcher=optuna"), ["may be drawn", "choose a divisor of 96"]),
        (DIVISORS, ("--ppo.batch_size=96", "--tune.scheduler=pbt", "--tune.trials=2"), ["choose a divisor of 96"]),
        (DIVISORS, ("--ppo.batch_size=96", "--tune.scheduler=pb2", "--tune.trials=2"), ["choose a divisor of 96"]),
    ],
)
def test_values_that_do_not_go_together_are_found_before_anything_starts(
    tmp_path: Path, domains: dict[str, Any], overrides: tuple[str, ...], parts: list[str]
) -> None:
    message = refusal(tmp_path, domains, *overrides)
    assert all(part in message for part in (*parts, "with `when`")) and "\n" not in message, message


@pytest.mark.parametrize("how", [("--tune.searcher=grid",), (), ("--tune.searcher=optuna",), ("--tune.scheduler=pbt",)])
def test_values_tied_to_what_they_go_with_are_accepted(tmp_path: Path, how: tuple[str, ...]) -> None:
    tied = CLASHING | {"ppo.minibatches": {**CLASHING["ppo.minibatches"], "when": {"ppo.batch_size": 96}}}
    domains = {"ppo.minibatches": {"type": "choice", "values": [4, 2]}} if "pbt" in "".join(how) else tied
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("".join(f'tune.space."{name}" = {toml(domain)}\n' for name, domain in domains.items()))
    assert load_recipe(recipe, (*EIGHT, *how)).tune.space.keys() == domains.keys()


def test_only_the_points_of_a_random_search_are_checked(tmp_path: Path) -> None:
    """With a seed under which the clash is not drawn the search has nothing to be refused for."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("".join(f'tune.space."{name}" = {toml(domain)}\n' for name, domain in CLASHING.items()))
    clash = {"ppo.batch_size": 64, "ppo.minibatches": 3}
    seeds = [seed for seed in range(20) if clash not in points(space_config(CLASHING, trials=2), seed)]
    loaded = load_recipe(recipe, (*EIGHT, f"--run.seed={seeds[0]}", "--tune.trials=2"))
    assert len(points(loaded.tune, loaded.run.seed)) == 2


def space_config(domains: dict[str, Any], **more: Any) -> TuneConfig:
    return TuneConfig(space=space(domains), **more)
