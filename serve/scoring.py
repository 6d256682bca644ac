"""The scoring service: one Ray Serve application with two deployments, `reward` and `reference`."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray import serve
from ray.exceptions import ActorAlreadyExistsError
from ray.serve.schema import ApplicationStatus, LoggingConfig

from app.config.ppo import ScoringConfig
from app.config.shared import WorkersConfig
from app.errors import DeadlineError, ScoringError
from app.workers.pending import last_line
from app.workers.processes import process_options
from app.workers.scoring_client import REFERENCE, REWARD, ServeScorer
from serve.replicas import Precision, ReferenceReplica, RewardReplica

POLL_SECONDS = 1.0
"""Each look at Serve's status takes the caller about 0.2 s of computing: it pickles the router class of every deployment."""

MAX_ONGOING_REQUESTS = 1024
"""Requests inside one replica at a time; the batcher's pool of callers to choose from."""

HEALTH_CHECK_PERIOD_SECONDS = 2.0
"""How soon a dead replica is noticed and replaced."""


def scoring_application(
    config: ScoringConfig,
    *,
    reward_path: str,
    reference_path: str,
    temperature: float,
    precision: Precision = "fp32",
    trust_remote_code: bool = False,
) -> serve.Application:
    """The application, not yet deployed. Log-probs are those of the reference's logits divided by `temperature`."""
    reference = _deployment(ReferenceReplica, REFERENCE, config.reference).bind(
        reference_path, config, precision, trust_remote_code, temperature
    )
    return _deployment(RewardReplica, REWARD, config.reward).bind(reward_path, config, precision, trust_remote_code, reference)


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
    """Deploy the scoring service on the Ray cluster this process is connected to, and delete it on exit.

    Yields a client once every replica is healthy. With `stop_serve`, Serve itself is stopped on exit if it was started here and
    holds no other application; without, the end of a Ray of one's own takes it along. Raises ScoringError when a replica cannot
    start (with its reason) or the name is taken, DeadlineError when the replicas are not there in time.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # Serve tells every start and stop on standard error
    started_serve = _start_serve()
    try:
        if not started_serve and name in serve.status().applications:
            raise ScoringError(f"the cluster already runs an application {name!r}: choose another name, or `ray.serve.delete` it")
        application = scoring_application(
            config,
            reward_path=reward_path,
            reference_path=reference_path,
            temperature=temperature,
            precision=precision,
            trust_remote_code=trust_remote_code,
        )
        try:
            serve.run_many(
                [serve.RunTarget(application, name=name, route_prefix=None, logging_config=_LOGGING)],
                wait_for_ingress_deployment_creation=False,
                wait_for_applications_running=False,
            )
            _wait_until_running(name, deadline_seconds)
            yield connect(name, config)
        finally:
            serve.delete(name)
    finally:
        if stop_serve and started_serve and not serve.status().applications:
            serve.shutdown()


def connect(name: str, config: ScoringConfig) -> ServeScorer:
    """One more client of a running service; it connects with its first request."""
    return ServeScorer(name, config)


_LOGGING = LoggingConfig(log_level="WARNING", enable_access_log=False)


def _deployment(replica: type, name: str, workers: WorkersConfig) -> serve.Deployment:
    return serve.deployment(
        name=name,
        num_replicas=workers.count,
        ray_actor_options=process_options(workers),
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        max_constructor_retry_count=1,
        health_check_period_s=HEALTH_CHECK_PERIOD_SECONDS,
        graceful_shutdown_wait_loop_s=0.1,
    )(replica)


def _start_serve() -> bool:
    """Start Serve on this cluster, unless it runs there; returns whether it was started here."""
    if _serve_is_running():
        return False
    try:
        serve.start(proxy_location="Disabled", logging_config=_LOGGING)
    except ActorAlreadyExistsError:  # another job on the cluster was a moment faster
        serve.start(proxy_location="Disabled", logging_config=_LOGGING)
        return False
    return True


def _serve_is_running() -> bool:
    names = ray.util.list_named_actors(all_namespaces=True)
    return any(actor["namespace"] == "serve" and actor["name"] == "SERVE_CONTROLLER_ACTOR" for actor in names)


def _wait_until_running(name: str, deadline_seconds: float) -> None:
    deadline = time.monotonic() + deadline_seconds
    while True:
        application = serve.status().applications[name]
        if application.status == ApplicationStatus.RUNNING:
            return
        late = {role: deployment for role, deployment in application.deployments.items() if deployment.status != "HEALTHY"}
        if application.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
            reasons = "; ".join(f"{role}: {last_line(deployment.message)}" for role, deployment in late.items())
            raise ScoringError(f"scoring service {name} cannot start: {reasons or last_line(application.message)}")
        if time.monotonic() > deadline:
            raise DeadlineError(
                f"starting the scoring service {name} waits on {', '.join(late) or 'Serve'} for more than {deadline_seconds:g} s: "
                "check that the cluster has the CPUs and GPUs of scoring.reward and scoring.reference"
            )
        time.sleep(POLL_SECONDS)
