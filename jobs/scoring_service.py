"""The scoring service as stages ask for it: model folders in, a Scorer per reward model out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from app.config.recipe import Recipe
from app.interfaces import Scorer
from jobs.local_ray import uses_cluster
from serve.scoring import start_scoring


def scoring_service(recipe: Recipe) -> Callable[[Sequence[str], str], AbstractContextManager[Sequence[Scorer]]]:
    """(reward model folders, reference policy folder) -> the Serve application of this recipe, up for the length of a `with` block."""

    def start(reward_paths: Sequence[str], reference_path: str) -> AbstractContextManager[Sequence[Scorer]]:
        return start_scoring(
            recipe.scoring,
            reward_paths=reward_paths,
            reference_path=reference_path,
            temperature=recipe.rollout.temperature,
            precision=recipe.model.precision,
            trust_remote_code=recipe.model.trust_remote_code,
            name=f"scoring-{run_digest(recipe)}",
            deadline_seconds=recipe.run.deadline_seconds,
            stop_serve=uses_cluster(),
        )

    return start


def run_digest(recipe: Recipe) -> str:
    """A short name of the run folder, so that runs on one cluster do not meet in one application."""
    return short_digest(str(Path(recipe.run.dir).absolute()))


def short_digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
