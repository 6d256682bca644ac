"""Learner k and engine k on one GPU, by Ray's own scheduling of logical GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import ray

from app.config.loading import with_values
from app.config.recipe import Recipe
from app.config.shared import WorkersConfig
from app.errors import DeadlineError
from app.workers.processes import process_options
from app.workers.shared_gpus import shared_gpus
from tests.waiting import wait_until

PAIRED = Recipe.model_validate(
    {
        "ppo": {"batch_size": 48, "workers": {"count": 3, "cpus": 0.5, "gpus": 1, "labels": {"market-type": "on-demand"}}},
        "rollout": {"engines": {"count": 2, "cpus": 0.25, "gpus": 1}, "colocate": True},
    }
)


def start(workers: WorkersConfig, strategies: Sequence[Any]) -> list[Any]:
    class Process:  # local, so that it travels as a whole: workers cannot import test modules
        def gpus(self) -> list[str]:
            return list(ray.get_runtime_context().get_accelerator_ids()["GPU"])

    actor = ray.remote(Process)
    return [actor.options(**process_options(workers), scheduling_strategy=strategy).remote() for strategy in strategies]


def wait_for_free_gpus(expected: float) -> None:
    """Until Ray has so many GPUs to give: it counts those of processes that just ended after a while."""
    wait_until(lambda: ray.available_resources().get("GPU", 0.0) == expected, f"{expected:g} free GPUs", pause=0.05)


def test_rank_and_engine_are_on_one_gpu_and_give_it_back() -> None:
    with shared_gpus(PAIRED) as placed:
        learners = start(placed.recipe.ppo.workers, placed.learners)
        engines = start(placed.recipe.rollout.engines, placed.engines)
        of_learners, of_engines = (
            ray.get([process.gpus.remote() for process in processes], timeout=60) for processes in (learners, engines)
        )
        wait_for_free_gpus(1.0)
    assert of_engines == of_learners[:2]
    assert sorted(len(gpus) for gpus in of_learners) == [1, 1, 1] and len({gpus[0] for gpus in of_learners}) == 3
    wait_for_free_gpus(4.0)


def test_gpus_that_never_come_free_end_in_an_error() -> None:
    with shared_gpus(PAIRED), pytest.raises(DeadlineError, match=r"not free within 0\.2 s"):
        with shared_gpus(with_values(PAIRED, {"run.deadline_seconds": 0.2})):
            pass
    wait_for_free_gpus(4.0)


def test_without_colocation_nothing_is_reserved() -> None:
    recipe = with_values(PAIRED, {"rollout.colocate": False})
    with shared_gpus(recipe) as placed:
        assert placed.recipe is recipe and not placed.learners and not placed.engines
        assert ray.available_resources()["GPU"] == 4.0
