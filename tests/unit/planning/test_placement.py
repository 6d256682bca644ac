"""What a command needs follows from its recipe alone."""

from __future__ import annotations

from collections import Counter

import pytest

from app.config.loading import with_values
from app.config.recipe import Recipe
from app.errors import PlacementError
from app.planning.memory import GIB
from app.planning.packing import NodeResources
from app.planning.placement import check_feasible, concurrent_trials, describe, placement
from app.stages.tuning.trial import trial_resources

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


def test_a_trial_asks_for_all_that_its_placement_group_holds() -> None:
    """Beside learner and engine its own process; and every engine, for a placement group has all of its bundles or none."""
    values = {"ppo.workers.cpus": 1.0, "rollout.engines.cpus": 0.5, "scoring.reward.cpus": 0.25, "scoring.reference.cpus": 0.25}
    recipe = with_values(Recipe(), {"tune.concurrent": 1, **values})

    def check(recipe: Recipe, cpus: float) -> None:
        check_feasible(recipe, "tune", {"CPU": cpus, "GPU": 0}, (NodeResources(cpus),))

    (trial,) = (stage for stage in placement(recipe, "tune") if stage.name == "tune")
    bundles = sum(bundle["CPU"] for bundle in trial_resources(recipe).bundles)
    assert trial.need("CPU") == pytest.approx(bundles + 0.5)
    with pytest.raises(PlacementError, match=r"stage tune needs 2\.01 CPUs \(.*trial 1 x 0\.01"):
        check(recipe, 2.0)
    check(recipe, 2.01)
    later = with_values(recipe, {"rollout.engines.count": 2, "rollout.min_engines": 1})
    check_feasible(later, "ppo", {"CPU": 2.01})
    with pytest.raises(PlacementError, match="stage tune"):
        check(later, 2.01)
    check(later, 2.51)
    with pytest.raises(PlacementError, match=r"trial 2 x 0\.01.*lower tune\.concurrent"):
        check(with_values(recipe, {"tune.concurrent": 2}), 2.01)


def test_auto_is_as_many_trials_as_find_room_beside_the_scoring_service() -> None:
    recipe = with_values(Recipe(), {"tune.trials": 4, "ppo.workers.cpus": 1.0, "rollout.engines.cpus": 1.0})  # and 0.5 for the scorers
    for cpus, fit in ((2.51, 1), (4.5, 1), (4.52, 2), (6.53, 3), (100, 4)):  # and 0.01 for each trial's own process
        assert concurrent_trials(recipe, {"CPU": cpus, "GPU": 0}) == fit
    uneven = (NodeResources(2.5), NodeResources(0.6), NodeResources(0.6), NodeResources(0.6))
    assert concurrent_trials(recipe, {"CPU": 4.5, "GPU": 0}, uneven) == 1  # enough in all, but not where a process would fit
    assert concurrent_trials(with_values(recipe, {"tune.concurrent": 3}), {"CPU": 1.0}) == 3
    assert concurrent_trials(recipe, {"CPU": 0.5}) == 1


def test_the_embedded_model_brings_the_stages_before() -> None:
    assert [stage.name for stage in placement(Recipe(), "ppo")] == ["sft", "rm", "ppo"]
    assert [stage.name for stage in placement(EIGHT_GPUS, "ppo")] == ["ppo"]


def test_a_process_never_spans_fractions_of_two_gpus() -> None:
    recipe = with_values(Recipe(), {"scoring.reward.gpus": 0.6, "scoring.reward.count": 2, "scoring.reference.gpus": 0.5})
    assert describe(recipe, "serve")["needs"]["GPU"] == 3


def fractions(learner: float, engine: float, reward: float, reference: float, count: int = 1) -> Recipe:
    gpus = {"ppo.workers": learner, "rollout.engines": engine, "scoring.reward": reward, "scoring.reference": reference}
    counts = {"ppo.workers.count": count, "rollout.engines.count": count, "rollout.colocate": False}
    return with_values(EIGHT_GPUS, {**counts, **{f"{key}.gpus": value for key, value in gpus.items()}})


def test_fractions_that_fit_on_one_gpu_need_one() -> None:
    recipe = fractions(0.4, 0.4, 0.1, 0.1)
    assert describe(recipe, "ppo")["needs"]["GPU"] == 1
    check_feasible(recipe, "ppo", {"CPU": 16, "GPU": 1}, (NodeResources(16, 1),))
    with pytest.raises(PlacementError, match=r"needs 2 GPUs \(learner 1 x 0.5, engine 1 x 0.4,"):
        check_feasible(fractions(0.5, 0.4, 0.1, 0.1), "ppo", {"CPU": 16, "GPU": 1})


def test_fractions_are_packed_in_the_order_in_which_processes_start() -> None:
    """Engines come first, and Ray gives both the same GPU: of two GPUs that leaves one that a learner fits on."""
    recipe = fractions(0.8, 0.2, 0.1, 0.1, count=2)
    with pytest.raises(PlacementError, match=r"learner 2 of 2 needs 0.8 GPU"):
        check_feasible(
            with_values(recipe, {"scoring.reward.gpus": 0, "scoring.reference.gpus": 0}),
            "ppo",
            {"CPU": 16, "GPU": 2},
            (NodeResources(16, 2),),
        )
    check_feasible(recipe, "ppo", {"CPU": 16, "GPU": 3}, (NodeResources(16, 3),))


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


def on_gpus(learners: int, engines: int, scorers: float, *, colocate: bool = False) -> Recipe:
    values = {"ppo.batch_size": 48 * learners, "ppo.micro_batch_size": 1, "ppo.workers.count": learners, "ppo.workers.gpus": 1}
    values |= {"rollout.engines.count": engines, "rollout.engines.gpus": 1, "rollout.colocate": colocate}
    return with_values(EIGHT_GPUS, values | {"scoring.reward.gpus": scorers, "scoring.reference.gpus": scorers})


@pytest.mark.parametrize(
    ("recipe", "gpus", "learner_nodes"),
    [
        (with_values(on_gpus(1, 1, 0.25, colocate=True), {"ppo.workers.gpus": 0.25, "rollout.engines.gpus": 0.25}), [1], 1),
        (on_gpus(1, 1, 0.5, colocate=True), [2], 1),
        (on_gpus(4, 2, 1), [8], 1),
        (on_gpus(8, 6, 1), [8, 8], 1),
        (on_gpus(16, 46, 1), [8] * 8, 2),
        (on_gpus(8, 5, 0.5), [2, 0, 8, 4], 1),
    ],
    ids=["1", "2", "8", "16", "64", "uneven"],
)
def test_the_rules_of_every_role(recipe: Recipe, gpus: list[int], learner_nodes: int) -> None:
    """Learners on the fewest nodes, engines over what is left, scorers on GPUs that no learner or engine has unless all are shared."""
    (stage,) = placement(recipe, "ppo")
    slots = stage.slots(tuple(NodeResources(32 * max(1, count), count) for count in gpus))
    held = {role.name: Counter((slot.node, gpu) for slot in slots if slot.role == role.name for gpu in slot.gpus) for role in stage.roles}
    learners, engines, scorers = held["learner"], held["engine"], held["reward"] + held["reference"]
    assert {name: len(places) for name, places in held.items()} == {role.name: role.count for role in stage.roles}
    assert len({node for node, _ in learners}) == learner_nodes
    if recipe.rollout.colocate:
        assert engines == learners
    else:
        free = {node: count - sum(place[0] == node for place in [*learners, *scorers]) for node, count in enumerate(gpus)}
        took = Counter(node for node, _ in engines)
        assert not engines.keys() & learners.keys()
        assert all(took[a] <= took[b] + 1 or took[b] == free[b] for a in free for b in free), "a node with room has fewer"
    if len(gpus) > 1 or gpus[0] > 1:
        assert not scorers.keys() & (learners + engines).keys()


def test_engines_that_may_come_later_need_no_room_yet() -> None:
    recipe = with_values(EIGHT_GPUS, {"rollout.colocate": False, "rollout.transfer": "object_store"})
    with pytest.raises(PlacementError, match="14 GPUs"):
        check_feasible(recipe, "ppo", {"CPU": 64, "GPU": 10})
    growing = with_values(recipe, {"rollout.min_engines": 2})
    check_feasible(growing, "ppo", {"CPU": 64, "GPU": 10}, (NodeResources(64, 10),))
    with pytest.raises(PlacementError, match="10 GPUs"):
        check_feasible(growing, "ppo", {"CPU": 64, "GPU": 9})
