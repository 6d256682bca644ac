"""`corral serve`: the scoring service, and chat, behind HTTP and gRPC."""

from __future__ import annotations

import argparse
import queue
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.errors import CorralError, ScoringError, first_line
from app.run_layout import LOGS
from jobs import serving_inputs
from jobs.command import DRY_RUN, Tool

if TYPE_CHECKING:
    from ray import serve

    from app.config.recipe import Recipe
    from app.config.serving import ServedModelConfig, ServingConfig

APPLICATION = "scoring"

ANSWER_SECONDS = 60.0
"""How long a model that is up may take to say what it is."""

CLOSE_SECONDS = 120.0
"""Longest wait for requests in flight when the service stops."""


@dataclass(frozen=True)
class Service:
    """What is served, checked: the models by name, the doors with their ports, and the token that requests must carry."""

    recipe: Recipe
    models: dict[str, ServedModelConfig]
    doors: ServingConfig
    token: str | None

    def targets(self) -> list[serve.RunTarget]:
        """The applications, not yet deployed."""
        targets = [self.scoring()] if self.models else []
        if self.doors.chat:
            from serve.chat import chat_application, chat_target

            targets.append(chat_target(chat_application(self.doors, token=self.token, **self._loading)))
        return targets

    def scoring(self, *, closed: bool = False) -> serve.RunTarget:
        """The scoring application; `closed`: without its doors."""
        from serve.deploying import target
        from serve.scoring import scoring_application

        application = scoring_application(self.models, doors=None if closed else self.doors, token=self.token, **self._loading)
        return target(application, APPLICATION, None if closed else "/")

    @property
    def _loading(self) -> dict[str, Any]:
        return {"precision": self.recipe.model.precision, "trust_remote_code": self.recipe.model.trust_remote_code}


def check(recipe: Recipe, doors: ServingConfig | None = None) -> Service:
    """Everything that can be wrong with the input. `doors`: those that are open already. Raises CorralError."""
    from app.planning.placement import check_feasible
    from jobs import local_ray

    models, token = check_given(recipe)
    check_feasible(recipe, "serve", local_ray.cluster_resources(), local_ray.cluster_nodes())
    if doors is None:
        return Service(recipe, models, serving_inputs.opened_doors(recipe.serving), token)
    kept = {key: getattr(doors, key) for key in ("host", "http_port", "grpc_port")}
    return Service(recipe, models, recipe.serving.model_copy(update=kept), token)


def check_given(recipe: Recipe) -> tuple[dict[str, ServedModelConfig], str | None]:
    """The models and the token, checked. Raises CorralError."""
    from app.config.served_models import named_models
    from serve.access import bearer_token

    models = serving_inputs.checked_models(named_models(recipe), recipe.model.trust_remote_code)
    if recipe.serving.chat:
        from serve.chat import check_chat_models

        check_chat_models(recipe.serving.chat, recipe.model.precision, recipe.model.trust_remote_code)
    return models, bearer_token(recipe.serving)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    serving_inputs.add_arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help=DRY_RUN)


def run(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Keep the service up until SIGINT or SIGTERM; SIGHUP reads the recipe again."""
    recipe = serving_inputs.serving_recipe(arguments, overrides)
    if arguments.dry_run:
        from app.config.loading import to_toml
        from jobs.dry_run import obstacles, sizes

        sys.stdout.write(to_toml(recipe) + sizes(recipe, "serve") + obstacles(recipe, "serve", lambda: check_given(recipe)))
        return 0
    service = check(recipe)
    from jobs import interrupts, local_ray

    with local_ray.running_ray(Path(recipe.run.dir).absolute() / LOGS):
        from serve.deploying import deployed, http_door

        start = http_door(service.doors.host, service.doors.http_port)
        deadline = recipe.run.deadline_seconds
        with deployed(service.targets(), deadline_seconds=deadline, stop_serve=local_ray.uses_cluster(), start=start) as running:

            def update() -> None:
                nonlocal service
                service = check(serving_inputs.serving_recipe(arguments, overrides), service.doors)
                running.update(service.targets(), deadline)
                announce(service)

            try:
                wait(update, started=lambda: announce(service))
            except KeyboardInterrupt:
                sys.stdout.write("stopping: requests in flight are answered first\n")
                sys.stdout.flush()
                with interrupts.shielded():
                    close(service)
    return 0


def wait(update: Callable[[], None], *, started: Callable[[], None]) -> None:
    """Until KeyboardInterrupt; `started` is called once hangups are heard, and `update` at every SIGHUP. Its failure is told, no more."""
    hangups: queue.SimpleQueue[int] = queue.SimpleQueue()  # the one queue that a signal handler may fill
    previous = signal.signal(signal.SIGHUP, lambda number, frame: hangups.put(number))
    try:
        started()
        while True:
            hangups.get()
            try:
                update()
            except CorralError as error:
                sys.stderr.write(f"corral: not updated: {' '.join(str(error).split())}\n")
    finally:
        signal.signal(signal.SIGHUP, previous)


def close(service: Service) -> None:
    """Close the doors while the models still answer what came in through them; Serve would stop all of an application at a time."""
    from serve.deploying import deploy

    if service.models:
        deploy([service.scoring(closed=True)], CLOSE_SECONDS)


def announce(service: Service) -> None:
    """One line per model, as the service itself describes it, and how to stop. Raises ScoringError when a model does not answer."""
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    host = f"[{service.doors.host}]" if ":" in service.doors.host else service.doors.host
    http, grpc = f"http://{host}:{service.doors.http_port}", f"{host}:{service.doors.grpc_port}"
    for name in service.models:
        try:
            model = serve.get_deployment_handle(name, APPLICATION).describe.remote().result(timeout_s=ANSWER_SECONDS)
        except (RayError, RayServeException, TimeoutError) as error:
            raise ScoringError(f"model {name} does not answer ({first_line(error)}); see the logs of its replica") from error
        if model.refused:
            sys.stderr.write(f"corral: {name}: {model.refused}\n")
        weights = f"version {model.identity.version}, weights {model.identity.weights_hash[:12]}"
        sys.stdout.write(f"{name}: {model.kind} model, {weights}, {http}/v2/models/{name}, grpc {grpc}\n")
    for name in service.doors.chat:
        sys.stdout.write(f"{name}: chat model, {http}/v1/chat/completions\n")
    sys.stdout.write(f"documentation: {http}/docs; Ctrl-C stops the service\n" if service.models else "Ctrl-C stops the service\n")
    sys.stdout.flush()


TOOL = Tool(
    purpose="serve reward models, reference policies and chat over HTTP and gRPC",
    details=(
        "Serves the models that serving.models names or --model gives; where neither does, the reward model (reward.path) and the\n"
        "reference policy (model.path) of a recipe. Stays up until Ctrl-C or SIGTERM; SIGHUP reads the recipe again and swaps models\n"
        "in place. Clients: docs/serving.md.\n\n"
        "examples:\n"
        "  corral serve --model reward=runs/demo/rm/model --model reference=runs/demo/sft/model\n"
        "  corral serve jobs/recipes/tiny/ppo.toml --model.path=runs/demo/sft/model --reward.path=runs/demo/rm/model"
    ),
    add_arguments=add_arguments,
    run=run,
    keys=serving_inputs.SECTIONS,
)
