"""Which tracking services there are, and opening those that a recipe names."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

from app.config.loading import resolved
from app.config.recipe import Recipe
from app.config.tracking import TrackingConfig
from app.durable import read_json, write_json
from app.errors import ConfigError
from app.trackers.delivery import reason
from app.trackers.service import RunFacts, TrackingService

IDS_FILE = "tracking.json"
"""In the run folder: service -> its id of the run."""


def _wandb(facts: RunFacts) -> TrackingService:
    from app.trackers.weights_and_biases import WandbRun

    return WandbRun(facts)


def _mlflow(facts: RunFacts) -> TrackingService:
    from app.trackers.mlflow_run import MlflowRun

    return MlflowRun(facts)


SERVICES: dict[str, Callable[[RunFacts], TrackingService]] = {"wandb": _wandb, "mlflow": _mlflow}
"""By the name of the Python package that each needs."""
PIP_NAMES = {"mlflow": "mlflow-skinny"}
"""Where the distribution is not called like the package."""


def require_packages(config: TrackingConfig) -> None:
    """Raises ConfigError for a service of `tracking.also` whose package is not installed."""
    for name in config.also:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"tracking.also = {name}: its package is not installed; run: pip install {PIP_NAMES.get(name, name)}")


def open_services(recipe: Recipe, run_path: Path) -> dict[str, TrackingService]:
    """Begin or go on with the run on every service of `tracking.also`. Raises ConfigError when one cannot be reached."""
    config, file = recipe.tracking, run_path / IDS_FILE
    ids = read_json(file) if file.is_file() else {}
    services: dict[str, TrackingService] = {}
    for name in config.also:
        facts = RunFacts(run_path, config.project, config.name or run_path.name, ids.get(name), resolved(recipe))
        try:
            services[name] = SERVICES[name](facts)
        except Exception as error:  # whatever the service's library raises
            for opened in services.values():
                opened.close(failed=True)
            raise ConfigError(
                f"tracking.also = {name}: the run cannot be opened there ({reason(error)}): check the service's address and login, "
                f"or leave it out of tracking.also"
            ) from error
        write_json(file, ids := ids | {name: services[name].run_id})
    return services
