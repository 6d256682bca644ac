"""Learner ranks and rollout engines in pairs on one GPU each, as `rollout.colocate` asks: rank k and engine k share a bundle of a
placement group, so that Ray gives both the same GPU. They take turns: the engine sleeps while its rank works."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from app.config.loading import with_values
from app.config.recipe import Recipe
from app.errors import DeadlineError


@dataclass(frozen=True)
class PlacedRecipe:
    """A recipe whose learners and engines reserve what their bundles have for them, and a scheduling strategy for each process.

    Without colocation the recipe is the given one and there are no strategies: every process goes where there is room.
    """

    recipe: Recipe
    learners: tuple[Any, ...] = ()
    engines: tuple[Any, ...] = ()


def bundles_of(recipe: Recipe) -> list[dict[str, float]]:
    """One per learner rank, with room for its engine. Both reserve a whole GPU in the recipe, or parts that add up to no more."""
    learner, engine = recipe.ppo.workers, recipe.rollout.engines
    shared = min(1.0, learner.gpus + engine.gpus)
    paired = {"CPU": learner.cpus + engine.cpus, "GPU": shared}
    alone = {"CPU": learner.cpus, "GPU": shared}
    return [paired if rank < engine.count else alone for rank in range(learner.count)]


@contextmanager
def shared_gpus(recipe: Recipe) -> Iterator[PlacedRecipe]:
    """The placement group of a run, for the length of a block. Raises DeadlineError when its GPUs are not free in time."""
    if not recipe.rollout.shares_gpus:
        yield PlacedRecipe(recipe)
        return
    bundles, workers = bundles_of(recipe), recipe.ppo.workers
    group = placement_group(bundles, strategy="PACK", bundle_label_selector=[dict(workers.labels) for _ in bundles])
    try:
        try:
            ray.get(group.ready(), timeout=recipe.run.deadline_seconds)
        except GetTimeoutError as error:
            raise DeadlineError(
                f"the GPUs that learners and engines share were not free within {recipe.run.deadline_seconds:g} s: wait for other jobs, "
                "or raise run.deadline_seconds"
            ) from error
        half = bundles[0]["GPU"] / 2
        reserved: dict[str, Any] = {"ppo.workers.gpus": half, "rollout.engines.gpus": half}
        reserved |= {"ppo.workers.labels": {}, "rollout.engines.labels": {}}  # the bundles have asked for them
        strategies = [PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank) for rank in range(len(bundles))]
        yield PlacedRecipe(with_values(recipe, reserved), tuple(strategies), tuple(strategies[: recipe.rollout.engines.count]))
    finally:
        remove_placement_group(group)
