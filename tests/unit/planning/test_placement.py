"""What a command needs follows from its recipe alone."""

from __future__ import annotations

import pytest

from app.config.loading import with_values
from app.config.recipe import Recipe
from app.errors import PlacementError
from app.planning.memory import GIB
from app.planning.placement import check_feasible, describe, placement

EIGHT_GPUS = with_values(
    Recipe(),
    {
        "model.path": "runs/sft-12b/sft/model",
        "reward.path": "runs/rm-1.4b/rm/model",
        "ppo.batch_size": 96,
        "ppo.micro_batch_size": 1,
        "ppo.workers.count": 6,
        "ppo.workers.gpus": 1,
        "rollout.engines.count": 6,
        "rollout.engines.gpus": 1,
        "rollout.colocate": True,
        "scoring.reward.gpus": 1,
        "scoring.reference.gpus": 1,
    },
)


def test_roles_alive_together_add_up_and_stages_do_not() -> None:
    recipe = with_values(Recipe(), {"sft.workers.count": 4, "rm.workers.count": 4})
    stages = {stage.name: stage.need("CPU") for stage in placement(recipe, "pipeline")}
    assert stages["sft"] == 4
    assert stages["rm"] == 4 + 1  # the engine loads meanwhile
    assert stages["ppo"] == 1 + 1 + 0.25 + 0.25
    assert describe(recipe, "pipeline")["needs"]["CPU"] == 5


def test_colocated_engines_take_no_gpus_of_their_own() -> None:
    assert describe(EIGHT_GPUS, "ppo")["needs"]["GPU"] == 8
    apart = with_values(EIGHT_GPUS, {"rollout.colocate": False})
    assert describe(apart, "ppo")["needs"]["GPU"] == 14


def test_engines_with_gpus_wait_for_the_reward_models_workers() -> None:
    assert [stage.name for stage in placement(EIGHT_GPUS, "rm")] == ["rm", "rm offset"]


def test_concurrent_trials_share_one_scoring_service() -> None:
    recipe = with_values(EIGHT_GPUS, {"tune.trials": 4, "tune.concurrent": 2})
    assert describe(recipe, "tune")["needs"]["GPU"] == 2 * (6 + 6) + 2
    fewer_trials = with_values(recipe, {"tune.trials": 1})
    assert describe(fewer_trials, "tune")["needs"]["GPU"] == 6 + 6 + 2


def test_the_embedded_model_brings_the_stages_before() -> None:
    assert [stage.name for stage in placement(Recipe(), "ppo")] == ["sft", "rm", "ppo"]
    assert [stage.name for stage in placement(EIGHT_GPUS, "ppo")] == ["ppo"]


def test_a_process_never_spans_fractions_of_two_gpus() -> None:
    recipe = with_values(Recipe(), {"scoring.reward.gpus": 0.6, "scoring.reward.count": 2, "scoring.reference.gpus": 0.5})
    assert describe(recipe, "serve")["needs"]["GPU"] == 2 + 0.5


def test_too_few_gpus_name_role_need_have_and_remedy() -> None:
    with pytest.raises(PlacementError) as caught:
        check_feasible(EIGHT_GPUS, "ppo", {"CPU": 64, "memory": 1000 * GIB})
    message = str(caught.value)
    for part in ("stage ppo", "8 GPUs", "learner 6 x 1", "has 0", "ppo.workers.count", "RAY_ADDRESS"):
        assert part in message


def test_too_little_memory() -> None:
    recipe = with_values(Recipe(), {"rollout.kv_cache_gib": 4000})
    with pytest.raises(PlacementError, match=r"engine 1 x 4e\+03.*has 24"):
        check_feasible(recipe, "ppo", {"CPU": 8, "GPU": 0, "memory": 24 * GIB})
    big = with_values(Recipe(), {"model.path": "EleutherAI/pythia-12b-deduped"})
    with pytest.raises(PlacementError, match=r"GiB of memory.*smaller model"):
        check_feasible(big, "sft", {"CPU": 8, "memory": 24 * GIB})


def test_what_fits_exactly_is_accepted() -> None:
    check_feasible(EIGHT_GPUS, "ppo", {"CPU": 14, "GPU": 8})
