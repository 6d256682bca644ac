"""The deployment that takes requests from outside: HTTP by Serve's proxy, gRPC by a server of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from ray import serve

from app.config.serving import DOORS, ServingConfig
from serve import access_log
from serve.byte_budget import LONGEST_REQUESTS, ByteBudget
from serve.credentials import Credentials
from serve.gateway import Gateway, Handle
from serve.grpc_door import GrpcDoor
from serve.http_door import http_app
from serve.scoring import versioned

MAX_ONGOING_REQUESTS = 1024
"""HTTP requests in the doors at a time."""

DRAIN_SECONDS = 30.0
"""How long calls in flight may take to end when the doors close."""


@serve.ingress()
class Doors:
    """Both doors of one service. handles: the models' deployments by name; credentials: of `token`."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, handles: Mapping[str, Handle], config: ServingConfig, credentials: Credentials, trust_remote_code: bool = False
    ) -> None:
        access_log.open_log(config.access_log)
        self._config = config
        self._credentials = credentials
        self._handles = dict(handles)
        self._gateway = Gateway(self._handles, config, trust_remote_code)
        self._budget = ByteBudget(LONGEST_REQUESTS * config.max_request_bytes)
        self._grpc = GrpcDoor(self._gateway, credentials, self._budget, max_bytes=config.max_request_bytes)
        await self._grpc.start(config.host, config.grpc_port)

    def reconfigure(self, settings: Mapping[str, list[str]]) -> None:
        """Serve's hook for a changed user config: models come and go behind open doors, so that no caller's channel is closed."""
        application = serve.get_replica_context().app_name
        for name in self._handles.keys() - settings["models"]:
            del self._handles[name]
        for name in settings["models"]:
            if name not in self._handles:
                self._handles[name] = serve.get_deployment_handle(name, application)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve's hook for an application that is built where it runs."""
        return http_app(self._gateway, self._config, self._credentials, self._budget)

    async def __del__(self) -> None:
        """Serve calls it when a replica is to stop, after the last HTTP request."""
        await self._grpc.stop(DRAIN_SECONDS)


def doors_application(
    replicas: Mapping[str, serve.Application], config: ServingConfig, token: str | None = None, trust_remote_code: bool = False
) -> serve.Application:
    """The application of the models in `replicas`, behind the doors. It runs on the head node, beside Serve's HTTP proxy there, so
    that both ports are on one host; it takes no CPU of those that models ask for."""
    credentials = Credentials.of(token)
    settled = config.model_copy(update={"models": {}, "chat": {}})  # what changes there needs no other doors
    arguments: tuple[Any, ...] = (dict(replicas), settled, credentials, trust_remote_code)
    deployment = serve.deployment(
        name=DOORS,
        user_config={"models": sorted(replicas)},
        ray_actor_options={"num_cpus": 0, "resources": {"node:__internal_head__": 0.001}},
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        max_surge_percent=100,  # new doors open before the old ones close
        health_check_period_s=2.0,
        graceful_shutdown_timeout_s=2 * DRAIN_SECONDS,
        graceful_shutdown_wait_loop_s=0.1,
    )(Doors)
    unchanging = (settled.model_dump_json(), credentials, trust_remote_code)
    return versioned(deployment, unchanging).bind(*arguments)
