"""`corral serve`: the scoring service, and chat, behind HTTP and gRPC."""

from __future__ import annotations

import argparse
import queue
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from app.errors import CorralError
from jobs import serving_inputs
from jobs.command import Tool

if TYPE_CHECKING:
    from ray import serve

    from app.config.recipe import Recipe
    from app.config.serving import ServedModelConfig, ServingConfig

APPLICATION = "scoring"


@dataclass(frozen=True)
class Service:
    """What is served, checked: the models by name, the doors with their ports, and the token that requests must carry."""

    recipe: Recipe
    models: dict[str, ServedModelConfig]
    doors: ServingConfig
    token: str | None

    def targets(self) -> list[serve.RunTarget]:
        """The applications, not yet deployed."""
        from serve.deploying import target
        from serve.scoring import scoring_application

        settings = {"precision": self.recipe.model.precision, "trust_remote_code": self.recipe.model.trust_remote_code}
        targets = []
        if self.models:
            application = scoring_application(self.models, doors=self.doors, token=self.token, **settings)
            targets.append(target(application, APPLICATION, "/"))
        if self.doors.chat:
            from serve.chat import chat_application, chat_target

            targets.append(chat_target(chat_application(self.doors.chat, token=self.token, **settings)))
        return targets


def check(recipe: Recipe, doors: ServingConfig | None = None) -> Service:
    """Everything that can be wrong with the input. `doors`: those that are open already. Raises CorralError."""
    from app.workers.placement import check_feasible
    from jobs import local_ray
    from serve.scoring import named_models

    models = serving_inputs.checked_models(named_models(recipe), recipe.model.trust_remote_code)
    if recipe.serving.chat:
        from serve.chat import check_chat_models

        check_chat_models(recipe.serving.chat)
    token = serving_inputs.bearer_token(recipe.serving)
    check_feasible(recipe, "serve", local_ray.cluster_resources())
    if doors is None:
        return Service(recipe, models, serving_inputs.opened_doors(recipe.serving, token), token)
    kept = {key: getattr(doors, key) for key in ("host", "http_port", "grpc_port")}
    return Service(recipe, models, recipe.serving.model_copy(update=kept), token)


def run(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Keep the service up until SIGINT or SIGTERM; SIGHUP reads the recipe again."""
    recipe = serving_inputs.serving_recipe(arguments, overrides)
    if arguments.dry_run:
        from app.config.loading import to_toml
        from jobs.dry_run import sizes

        sys.stdout.write(to_toml(recipe) + sizes(recipe, "serve"))
        return 0
    service = check(recipe)
    from jobs import interrupts, local_ray

    with local_ray.running_ray(Path(recipe.run.dir).absolute() / "logs"):
        from serve.deploying import deploy, deployed

        start = {"proxy_location": "HeadOnly", "http_options": {"host": service.doors.host, "port": service.doors.http_port}}
        deadline = recipe.run.deadline_seconds
        with deployed(service.targets(), deadline_seconds=deadline, stop_serve=local_ray.uses_cluster(), start=start):
            announce(service)

            def update() -> None:
                changed = check(serving_inputs.serving_recipe(arguments, overrides), service.doors)
                deploy(changed.targets(), deadline)
                announce(changed)

            try:
                wait(update)
            except KeyboardInterrupt:
                sys.stdout.write("stopping: requests in flight are answered first\n")
                sys.stdout.flush()
                with interrupts.shielded():
                    drain()
    return 0


def wait(update: Callable[[], None]) -> None:
    """Until KeyboardInterrupt; every SIGHUP calls `update`, whose failure is told and leaves the service as it is."""
    hangups: queue.SimpleQueue[int] = queue.SimpleQueue()  # the one queue that a signal handler may fill
    previous = signal.signal(signal.SIGHUP, lambda number, frame: hangups.put(number))
    try:
        while True:
            hangups.get()
            try:
                update()
            except CorralError as error:
                sys.stderr.write(f"corral: not updated: {' '.join(str(error).split())}\n")
    finally:
        signal.signal(signal.SIGHUP, previous)
