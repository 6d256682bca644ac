"""Applications on a Ray Serve that several jobs of one cluster may share: start, deploy, wait, update, delete."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import ray
from ray import serve
from ray.exceptions import ActorAlreadyExistsError, RayActorError
from ray.serve import context
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, LoggingConfig

from app.errors import ConfigError, ScoringError
from app.workers.pending import last_line
from app.workers.watchdog import late

POLL_SECONDS = 1.0
"""Each look at Serve's status takes the caller about 0.2 s of computing: it pickles the router class of every deployment."""

NO_DOORS: Mapping[str, Any] = {"proxy_location": "Disabled"}
"""How Serve is started for applications that are reached by handles alone."""
LOGGING = LoggingConfig(log_level="WARNING", enable_access_log=False)


class ServeGoneError(ScoringError):
    """Serve was stopped by the job that had started it, while this one was deploying."""

    def __init__(self) -> None:
        super().__init__("Ray Serve was stopped by the job that had started it; start the service again")


class Deployed:
    """Applications that run until the end of a `deployed` block."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)

    def update(self, targets: Sequence[serve.RunTarget], deadline_seconds: float) -> None:
        """Run these instead: update what stays, start what is new, delete what is no longer there. Raises as `deploy`."""
        wanted = [each.name for each in targets]
        left = [name for name in self.names if name not in wanted]
        self.names = [*left, *wanted]
        deploy(targets, deadline_seconds)
        for name in left:
            delete(name)
        self.names = wanted


def http_door(host: str, port: int) -> Mapping[str, Any]:
    """How Serve is started with its HTTP proxy, on the head node. A dead proxy is noticed within 2 s (by default 10)."""
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": host, "port": port},
        "controller_options": {"runtime_env": {"env_vars": {"RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2"}}},
    }


def target(application: serve.Application, name: str, route_prefix: str | None = None) -> serve.RunTarget:
    """An application with the name and, where Serve's HTTP proxy leads to it, the route that it runs under."""
    return serve.RunTarget(application, name=name, route_prefix=route_prefix, logging_config=LOGGING)


@contextmanager
def deployed(
    targets: Sequence[serve.RunTarget], *, deadline_seconds: float, stop_serve: bool, start: Mapping[str, Any] = NO_DOORS
) -> Iterator[Deployed]:
    """Deploy new applications on the Ray cluster this process is connected to, and delete them on exit.

    start: how Serve is started (arguments of `serve.start`) where none runs there. The block begins once every replica is healthy.
    With `stop_serve`, Serve itself is stopped on exit if it was started here and holds no other application; without, the end of a
    Ray of one's own takes it along. Raises ScoringError when a replica cannot start (with its reason) or a name is taken,
    DeadlineError when the replicas are not there in time, ConfigError when a Serve that runs there listens elsewhere.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # Serve tells every start and stop on standard error
    started_serve = start_serve(start)
    running, up = Deployed([each.name for each in targets]), False
    try:
        if not started_serve:
            _check_http_door(start)
        for name in running.names:
            if not started_serve and name in serve.status().applications:
                raise ScoringError(f"the cluster already runs an application {name!r}: choose another name, or `ray.serve.delete` it")
        deadline = time.monotonic() + deadline_seconds
        try:
            while True:
                try:
                    deploy(targets, deadline - time.monotonic())
                    break
                except ServeGoneError:
                    started_serve = start_serve(start) or started_serve
            up = True
            yield running
        finally:
            if serve_is_running():
                for name in running.names:
                    # For a replica that never had a place Serve may wait longer than the call does: then it goes on deleting, and
                    # why the start failed is the error that counts.
                    with nullcontext() if up else suppress(TimeoutError):
                        delete(name)
    finally:
        close_handles(running.names)
        if stop_serve and started_serve and serve_is_running() and not serve.status().applications:
            serve.shutdown()


def deploy(targets: Sequence[serve.RunTarget], deadline_seconds: float) -> None:
    """Deploy applications, or update those that run under these names, and wait until all their replicas are healthy.

    Raises ScoringError, DeadlineError, and ServeGoneError when Serve was stopped meanwhile.
    """
    deadline = time.monotonic() + deadline_seconds
    if not serve_is_running():  # `run_many` would start one, with doors of its own choice
        raise ServeGoneError
    try:
        serve.run_many(list(targets), wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
    except (RayActorError, RayServeException) as error:
        if serve_is_running():
            raise
        raise ServeGoneError from error
    for each in targets:
        _wait_until_running(each.name, deadline, deadline_seconds)


def delete(name: str) -> None:
    """Delete an application, and wait until it is gone: with Serve itself, where the job that started it stops it meanwhile."""
    try:
        serve.delete(name)
    except (RayActorError, RayServeException):
        if serve_is_running():
            raise


def close_handles(applications: Collection[str]) -> None:
    """End the routers of this process's handles on these applications: their threads would outlive Ray and keep the process alive."""
    client = context._global_client  # None where Serve is stopped; asking for it would connect to another one
    for key, handle in [] if client is None else list(client.handle_cache.items()):
        if handle.app_name in applications:
            handle.shutdown()
            del client.handle_cache[key]


def start_serve(start: Mapping[str, Any]) -> bool:
    """Start Serve on this cluster, unless it runs there; returns whether it was started here."""
    if serve_is_running():
        return False
    try:
        serve.start(**start, logging_config=LOGGING)
    except ActorAlreadyExistsError:  # another job on the cluster was a moment faster
        serve.start(**start, logging_config=LOGGING)
        return False
    return True


def _check_http_door(start: Mapping[str, Any]) -> None:
    """Serve's HTTP options are those of its first start on a cluster."""
    wanted = start.get("http_options")
    if wanted is None:
        return
    options = context._get_global_client().http_config
    there = f"{options.host}:{options.port}" if serve.status().proxies else None
    if there != f"{wanted['host']}:{wanted['port']}":
        raise ConfigError(
            f"Ray Serve runs on this cluster already and listens on {there or 'no HTTP port'}: "
            f"{'take its host and port for serving.host and serving.http_port' if there else 'stop it first'}, or use another cluster"
        )


def serve_is_running() -> bool:
    names = ray.util.list_named_actors(all_namespaces=True)
    return any(actor["namespace"] == "serve" and actor["name"] == "SERVE_CONTROLLER_ACTOR" for actor in names)


def _wait_until_running(name: str, deadline: float, deadline_seconds: float) -> None:
    while True:
        application = _status(name)
        if application.status == ApplicationStatus.RUNNING:
            return
        waited_for = {role: deployment for role, deployment in application.deployments.items() if deployment.status != "HEALTHY"}
        if application.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
            reasons = "; ".join(f"{role}: {last_line(deployment.message)}" for role, deployment in waited_for.items())
            raise ScoringError(f"scoring service {name} cannot start: {reasons or last_line(application.message)}")
        if time.monotonic() > deadline:
            raise late(
                f"starting the scoring service {name}",
                f"waits on {', '.join(waited_for) or 'Serve'} for more than {deadline_seconds:g} s "
                "(check that the cluster has the CPUs and GPUs that its replicas take)",
            )
        time.sleep(POLL_SECONDS)


def _status(name: str) -> ApplicationStatusOverview:
    """Raises ServeGoneError where there is no such application, or no Serve."""
    try:
        return serve.status().applications[name]
    except (KeyError, RayActorError, RayServeException) as error:
        raise ServeGoneError from error
