"""Every shipped recipe parses, resolves and has a placement; no model is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.config.loading import load_recipe
from app.planning.memory import GIB
from app.planning.placement import check_feasible, describe, placement

RECIPES = Path(__file__).resolve().parents[3] / "jobs" / "recipes"
ALL = sorted(path.relative_to(RECIPES).as_posix() for path in RECIPES.rglob("*.toml"))
RUNNABLE = [name for name in ALL if not name.endswith("base.toml")]
A100_MACHINE = {"CPU": 96.0, "GPU": 8.0, "memory": 1100.0 * GIB}
LAPTOP = {"CPU": 2.0, "GPU": 0.0, "memory": 8.0 * GIB}


def command_of(name: str) -> str:
    """`pythia/rm-1.4b.toml` belongs to `corral rm`."""
    return Path(name).name.removesuffix(".toml").split("-")[0]


def machine_of(name: str) -> dict[str, float]:
    if name.startswith("pythia/"):
        return A100_MACHINE
    return LAPTOP | {"memory": 24.0 * GIB} | ({"CPU": 4.0, "GPU": 1.0} if "one-gpu" in name else {})


@pytest.mark.parametrize("name", ALL)
def test_parses(name: str) -> None:
    load_recipe(RECIPES / name)


@pytest.mark.parametrize("name", RUNNABLE)
def test_fits_its_machine(name: str) -> None:
    recipe, command = load_recipe(RECIPES / name), command_of(name)
    check_feasible(recipe, command, machine_of(name))
    assert describe(recipe, command)["needs"]["CPU"] > 0


@pytest.mark.parametrize("name", [name for name in RUNNABLE if name.startswith("tiny/")])
def test_tiny_recipes_fit_two_cores_and_eight_gib(name: str) -> None:
    check_feasible(load_recipe(RECIPES / name), command_of(name), LAPTOP)


@pytest.mark.parametrize("name", [name for name in RUNNABLE if name.startswith("pythia/")])
def test_pythia_recipes_use_eight_gpus(name: str) -> None:
    assert describe(load_recipe(RECIPES / name), command_of(name))["needs"]["GPU"] == 8


@pytest.mark.parametrize("name", RUNNABLE)
def test_header_gives_the_command_that_runs_it(name: str) -> None:
    first = (RECIPES / name).read_text().splitlines()[0]
    assert first.startswith(f"# corral {command_of(name)} jobs/recipes/{name}")


def test_run_folders_differ() -> None:
    folders = {name: load_recipe(RECIPES / name).run.dir for name in RUNNABLE}
    assert len(set(folders.values())) == len(folders), folders


def test_ppo_12b_has_open_assistants_split_and_numbers() -> None:
    recipe = load_recipe(RECIPES / "pythia" / "ppo-12b.toml")
    gpus = {role.name: role.need("GPU") for role in placement(recipe, "ppo")[0].roles}
    assert gpus == {"learner": 6, "engine": 0, "reward": 1, "reference": 1}
    assert (recipe.ppo.batch_size, recipe.ppo.epochs, recipe.ppo.accumulation) == (96, 4, 8)
    assert recipe.ppo.has_value_head and recipe.ppo.make_algorithm().config.value_coef == 1.0
    assert (recipe.ppo.kl.coef, recipe.ppo.reward.clip, recipe.ppo.algorithm.clip, recipe.rollout.top_p) == (0.1, 4.0, 0.4, 1.0)


def test_tune_runs_four_trials() -> None:
    tune = load_recipe(RECIPES / "tiny" / "tune.toml").tune
    assert tune.trials >= 4 and tune.space
