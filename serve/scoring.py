"""The scoring service: one Ray Serve application with a deployment per model and, where it is asked for, the doors in front.

PPO's service (`start_scoring`), `corral serve` and Serve's own commands (serve/builders.py) are all built here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig

from app.config.ppo import ScoringConfig
from app.config.serving import BatchingConfig, ServedModelConfig, ServingConfig
from app.models.load import seen_from_anywhere
from app.workers.processes import process_options
from app.workers.scoring_client import REFERENCE, REWARD, ServeScorer
from serve.deploying import deployed, target
from serve.replicas import ModelReplica, Precision

MAX_ONGOING_REQUESTS = 1024
"""Requests inside one replica at a time; the batcher's pool of callers to choose from."""

HEALTH_CHECK_PERIOD_SECONDS = 2.0
"""How soon a dead replica is noticed and replaced."""

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

    return doors_application(replicas, doors, token)


def _model(
    name: str, config: ServedModelConfig, precision: Precision, trust_remote_code: bool, *others: serve.Application
) -> serve.Application:
    """One model's deployment. Path and version are its user config: a change of these alone is made in place, by `reconfigure`;
    a change of anything else replaces replica by replica."""
    path = seen_from_anywhere(config.path)
    settled = config.model_copy(update={"path": path})
    unchanging = (config.model_copy(update={"path": "", "version": ""}).model_dump_json(), precision, trust_remote_code)
    deployment = serve.deployment(
        name=name,
        user_config={"path": path, "version": config.version},
        ray_actor_options=process_options(config.workers),
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        max_constructor_retry_count=1,
        max_surge_percent=config.surge_percent,
        health_check_period_s=HEALTH_CHECK_PERIOD_SECONDS,
        graceful_shutdown_timeout_s=config.timeout_seconds,
        graceful_shutdown_wait_loop_s=SHUTDOWN_POLL_SECONDS,
        **_replicas(config),
    )(ModelReplica)
    # without a version of its own every deployment from Python counts as changed code, and Serve would replace its replicas
    versioned = deployment.options(version=hashlib.sha256(repr(unchanging).encode()).hexdigest(), _internal=True)
    return versioned.bind(name, settled, precision, trust_remote_code, *others)


def _replicas(config: ServedModelConfig) -> dict[str, Any]:
    if config.max_replicas is None:
        return {"num_replicas": config.workers.count}
    scaling = AutoscalingConfig(
        min_replicas=config.workers.count,
        max_replicas=config.max_replicas,
        target_ongoing_requests=config.target_ongoing_requests,
        upscale_delay_s=config.upscale_delay_seconds,
        downscale_delay_s=config.downscale_delay_seconds,
        metrics_interval_s=1.0,
        look_back_period_s=2.0,
    )
    return {"autoscaling_config": scaling}


def ppo_models(config: ScoringConfig, *, reward_path: str, reference_path: str, temperature: float) -> dict[str, ServedModelConfig]:
    """The two models of a PPO run. Log-probs are those of the reference's logits divided by `temperature`."""
    batching = BatchingConfig(max_batch_tokens=config.max_batch_tokens, wait_seconds=config.batch_wait_seconds)
    shared = {"batching": batching, "timeout_seconds": config.timeout_seconds}
    return {
        REWARD: ServedModelConfig(path=reward_path, kind="reward", workers=config.reward, **shared),
        REFERENCE: ServedModelConfig(path=reference_path, kind="reference", workers=config.reference, temperature=temperature, **shared),
    }


@contextmanager
def start_scoring(
    config: ScoringConfig,
    *,
    reward_path: str,
    reference_path: str,
    temperature: float,
    name: str = "scoring",
    precision: Precision = "fp32",
    trust_remote_code: bool = False,
    deadline_seconds: float = 600.0,
    stop_serve: bool = True,
) -> Iterator[ServeScorer]:
    """Deploy the scoring service of a PPO run on the Ray cluster this process is connected to, and delete it on exit.

    Yields a client once every replica is healthy. Raises as `serve.deploying.deployed`, which explains `stop_serve`.
    """
    models = ppo_models(config, reward_path=reward_path, reference_path=reference_path, temperature=temperature)
    service = scoring_application(models, precision=precision, trust_remote_code=trust_remote_code)
    with deployed([target(service, name)], deadline_seconds=deadline_seconds, stop_serve=stop_serve):
        yield connect(name, config)


def connect(name: str, config: ScoringConfig) -> ServeScorer:
    """One more client of a running service; it connects with its first request."""
    return ServeScorer(name, config)
