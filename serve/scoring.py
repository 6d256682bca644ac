"""The scoring service: one Ray Serve application with a deployment per model and, where it is asked for, the doors in front.

PPO's service (`start_scoring`), `corral serve` and Serve's own commands (serve/builders.py) are all built here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig

from app.config.scoring import ScoringConfig
from app.config.served_models import REWARD, ppo_models, reward_names
from app.config.serving import ServedModelConfig, ServingConfig
from app.models.heads import Precision
from app.models.load import seen_from_anywhere
from app.workers.processes import process_options
from app.workers.scoring_client import ServeScorer
from serve.deploying import deployed, target
from serve.replicas import ModelReplica

MAX_ONGOING_REQUESTS = 1024
"""Requests inside one replica at a time; the batcher's pool of callers to choose from."""

HEALTH_CHECK_PERIOD_SECONDS = 2.0
"""How soon a dead replica is noticed and replaced."""

LOAD_INTERVAL_SECONDS = 1.0
"""How often replicas and callers report their load to the autoscaler."""

SHUTDOWN_POLL_SECONDS = 0.1
"""How often a replica that is to stop looks whether its last request is answered."""


def scoring_application(
    models: Mapping[str, ServedModelConfig],
    *,
    doors: ServingConfig | None = None,
    token: str | None = None,
    precision: Precision = "fp32",
    trust_remote_code: bool = False,
) -> serve.Application:
    """The application, not yet deployed: one deployment per model, named as the model, and with `doors` the one that takes requests.

    Without doors the models are reached by their handles alone.
    """
    replicas = {name: _model(name, model, precision, trust_remote_code) for name, model in models.items()}
    if doors is None:
        # Serve deploys what the arguments of an application's root reach: the first model holds handles that it never calls.
        (root, first), *_ = models.items()
        others = tuple(replica for name, replica in replicas.items() if name != root)
        return _model(root, first, precision, trust_remote_code, *others)
    from serve.doors import doors_application  # the doors' libraries are not needed where there are none

    return doors_application(replicas, doors, token, trust_remote_code)


def _model(
    name: str, config: ServedModelConfig, precision: Precision, trust_remote_code: bool, *others: serve.Application
) -> serve.Application:
    """One model's deployment, named as the model."""
    config = config.model_copy(update={"path": seen_from_anywhere(config.path)})
    deployment = serve.deployment(name=name, **model_options(config))(ModelReplica)
    settled = (config.model_copy(update={"path": "", "version": ""}).model_dump_json(), precision, trust_remote_code)
    return versioned(deployment, settled).bind(name, config, precision, trust_remote_code, *others)


def model_options(config: ServedModelConfig) -> dict[str, Any]:
    """Serve's options for a model's replicas. Path and version are the user config: a change of these is made in place, by
    `reconfigure`, and any other change replaces replica by replica."""
    return {
        "user_config": {"path": config.path, "version": config.version},
        "ray_actor_options": process_options(config.workers),
        "max_ongoing_requests": MAX_ONGOING_REQUESTS,
        "max_constructor_retry_count": 1,
        "max_surge_percent": config.surge_percent,
        "health_check_period_s": HEALTH_CHECK_PERIOD_SECONDS,
        "graceful_shutdown_timeout_s": config.timeout_seconds,
        "graceful_shutdown_wait_loop_s": SHUTDOWN_POLL_SECONDS,
        **_replicas(config),
    }


def _replicas(config: ServedModelConfig) -> dict[str, Any]:
    if config.max_replicas is None:
        return {"num_replicas": config.workers.count}
    scaling = AutoscalingConfig(
        min_replicas=config.workers.count,
        max_replicas=config.max_replicas,
        target_ongoing_requests=config.target_ongoing_requests,
        upscale_delay_s=config.upscale_delay_seconds,
        downscale_delay_s=config.downscale_delay_seconds,
        metrics_interval_s=LOAD_INTERVAL_SECONDS,
        look_back_period_s=2 * LOAD_INTERVAL_SECONDS,
    )
    return {"autoscaling_config": scaling}


def versioned(deployment: serve.Deployment, settled: object) -> serve.Deployment:
    """The deployment as code of a version of its own: what is deployed anew with equal `settled` keeps its replicas. Without one,
    Serve takes every deployment from Python for changed code."""
    return deployment.options(version=hashlib.sha256(repr(settled).encode()).hexdigest(), _internal=True)


@contextmanager
def start_scoring(
    config: ScoringConfig,
    *,
    reward_paths: Sequence[str],
    reference_path: str,
    temperature: float,
    name: str = "scoring",
    precision: Precision = "fp32",
    trust_remote_code: bool = False,
    deadline_seconds: float = 600.0,
    stop_serve: bool = True,
) -> Iterator[list[ServeScorer]]:
    """Deploy the scoring service of a PPO run on the Ray cluster this process is connected to, and delete it on exit.

    Yields a client per reward model, in their order, once every replica is healthy; all share the reference. Raises as
    `serve.deploying.deployed`, which explains `stop_serve`.
    """
    models = ppo_models(config, reward_paths=reward_paths, reference_path=reference_path, temperature=temperature)
    service = scoring_application(models, precision=precision, trust_remote_code=trust_remote_code)
    with deployed([target(service, name)], deadline_seconds=deadline_seconds, stop_serve=stop_serve):
        yield [connect(name, config, reward) for reward in reward_names(len(reward_paths))]


def connect(name: str, config: ScoringConfig, reward: str = REWARD) -> ServeScorer:
    """One more client of a running service; it connects with its first request."""
    return ServeScorer(name, config, reward)
