"""`corral serve`: the scoring service."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.command import Command

if TYPE_CHECKING:
    from app.config.recipe import Recipe


def run(recipe: Recipe) -> None:
    """Keep the scoring application up until SIGINT or SIGTERM."""
    from app.planning.placement import check_feasible
    from jobs import local_ray
    from jobs.inputs import check_inputs

    check_feasible(recipe, "serve", local_ray.cluster_resources(), local_ray.cluster_nodes())
    check_inputs(recipe, "serve")
    with local_ray.running_ray(Path(recipe.run.dir).absolute() / "logs"):
        from app.models.load import seen_from_anywhere
        from jobs.scoring_service import scoring_service

        with scoring_service(recipe)(seen_from_anywhere(str(recipe.reward.path)), seen_from_anywhere(recipe.model.path)):
            sys.stdout.write(f"scoring with {recipe.reward.path} and {recipe.model.path}; Ctrl-C stops it\n")
            sys.stdout.flush()
            try:
                threading.Event().wait()
            except KeyboardInterrupt:
                sys.stdout.write("stopping\n")


COMMAND = Command(
    purpose="serve a reward model and a reference policy over Ray Serve",
    details="Reads a reward model (reward.path) and a reference policy (model.path); stays up until Ctrl-C or SIGTERM.",
    example="corral serve jobs/recipes/tiny/ppo.toml --model.path=runs/demo/sft/model --reward.path=runs/demo/rm/model",
    sections=("run", "model", "reward", "rollout", "scoring"),
    run=run,
)
