"""Chat with the result: OpenAI's protocol over vLLM engines, by Ray Serve LLM, as one more application of the same Serve.

Importing ray.serve.llm loads vLLM, which takes long: it is imported where an application is built, and in its replicas.
"""

from __future__ import annotations

import hmac
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from ray import serve
from ray.llm._internal.common.callbacks.base import CallbackBase
from ray.serve.schema import LoggingConfig
from starlette.middleware.base import RequestResponseEndpoint
from starlette.responses import JSONResponse, Response

from app.config.serving import ChatModelConfig
from app.errors import ConfigError, ModelError
from app.models.context import context_of
from app.models.load import check_model_folder, seen_from_anywhere, writes_text
from app.workers.processes import process_environment
from app.workers.rollout import DTYPES, ENGINE_VARIABLES, cpu_settings
from serve.replicas import Precision

APPLICATION, ROUTE, DOOR = "chat", "/v1", "chat_door"
MAX_ONGOING_REQUESTS = 1024
"""Of the door and of each engine, which takes as many of them at a time as its KV cache holds."""


def check_chat_models(models: Mapping[str, ChatModelConfig]) -> None:
    """Raises ModelError or ConfigError for what cannot be chatted with, before anything is started."""
    for name, model in models.items():
        check_model_folder(model.path, chat_template=True)
        if not writes_text(model.path):
            raise ModelError(f"chat model {name} = {model.path}: a reward model or an encoder writes no answers; name a language model")
        gpus = model.workers.gpus
        if gpus > 1 and gpus != int(gpus):
            raise ConfigError(f"serving.chat.{name}.workers.gpus = {gpus}: an engine has whole GPUs, or a share of one")


def chat_application(
    models: Mapping[str, ChatModelConfig], *, token: str | None = None, precision: Precision = "fp32", trust_remote_code: bool = False
) -> serve.Application:
    """The application, not yet deployed, to run at ROUTE: `/v1/models`, `/v1/chat/completions` and `/v1/completions` for all models.

    token: the bearer token that requests must carry (the clients' `api_key`).
    """
    with _own_logging():
        from ray.llm._internal.serve.core.configs.openai_api_models import to_model_metadata
        from ray.serve.llm import build_llm_deployment
        from ray.serve.llm.ingress import OpenAiIngress, make_fastapi_ingress

        configs = {name: _llm_config(name, model, precision, trust_remote_code) for name, model in models.items()}
        engines = {name: build_llm_deployment(config, override_serve_options={"name": name}) for name, config in configs.items()}
    door = serve.deployment(
        make_fastapi_ingress(OpenAiIngress, endpoint_map=_ENDPOINTS, app=_front(token)),
        name=DOOR,
        num_replicas=1,
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        ray_actor_options={"num_cpus": 0},
    )
    return door.bind(llm_deployments=engines, model_cards={name: to_model_metadata(name, config) for name, config in configs.items()})


def chat_target(application: serve.Application) -> serve.RunTarget:
    """What `serve.run_many` is given to run the application beside others."""
    return serve.RunTarget(application, name=APPLICATION, route_prefix=ROUTE, logging_config=_LOGGING)


_LOGGING = LoggingConfig(log_level="WARNING", enable_access_log=False)
_ENDPOINTS = {
    "models": lambda app: app.get("/models"),
    "model_data": lambda app: app.get("/models/{model:path}"),
    "chat": lambda app: app.post("/chat/completions"),
    "completions": lambda app: app.post("/completions"),
}


@contextmanager
def _own_logging() -> Iterator[None]:
    """Ray Serve LLM, when it is imported, replaces the process's log handlers by one that shows everything as JSON: undone here."""
    root, libraries = logging.getLogger(), logging.getLogger("ray.serve")
    handlers, level = list(root.handlers), root.level
    libraries.setLevel(logging.WARNING)
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


class _NothingToFetch(CallbackBase):
    """Ray Serve LLM starts a task on each node, which imports vLLM, to download the model; a folder is there already, and a hub
    name is fetched by vLLM itself."""

    async def on_before_node_init(self) -> None:
        self.ctx.run_init_node = False


def _llm_config(name: str, model: ChatModelConfig, precision: Precision, trust_remote_code: bool) -> Any:
    """Ray's description of an engine: with GPUs its workers hold them, without it reserves the CPUs of its replica."""
    from ray.serve.llm import LLMConfig

    context = context_of(model.path)
    length = model.max_model_len if context is None else min(context, model.max_model_len)
    workers, gpus = model.workers, model.workers.gpus
    tensor_parallel = max(1, int(gpus))
    settings = {"gpu_memory_utilization": model.gpu_memory_utilization} if gpus else cpu_settings(model.kv_cache_gib, length)
    return LLMConfig(
        model_loading_config={"model_id": name, "model_source": seen_from_anywhere(model.path)},
        accelerator_config={"kind": "gpu" if gpus else "cpu"},
        placement_group_config={"bundle_per_worker": {"CPU": 0.0, "GPU": gpus / tensor_parallel}},
        deployment_config={
            "num_replicas": workers.count,
            "max_ongoing_requests": MAX_ONGOING_REQUESTS,
            "ray_actor_options": {"num_cpus": workers.cpus},
            "logging_config": _LOGGING.model_dump(),
        },
        engine_kwargs={
            "dtype": DTYPES[precision],
            "max_model_len": length,
            "enforce_eager": not gpus,
            "tensor_parallel_size": tensor_parallel,
            "trust_remote_code": trust_remote_code,
            **settings,
        },
        callback_config={"callback_class": _NothingToFetch},
        runtime_env={"env_vars": process_environment(workers, **ENGINE_VARIABLES)},
    )


def _front(token: str | None) -> FastAPI:
    """The door's web application: errors in OpenAI's form, and the token asked for where there is one."""
    from ray.llm._internal.serve.core.configs.openai_api_models import OpenAIHTTPException

    front = FastAPI(title="Corral chat", description="OpenAI's chat protocol over vLLM engines.")
    for kind in (HTTPException, OpenAIHTTPException, RequestValidationError):
        front.add_exception_handler(kind, _refusal)
    if token is not None:
        expected = f"Bearer {token}".encode()

        @front.middleware("http")
        async def authorise(request: Request, go_on: RequestResponseEndpoint) -> Response:
            given = request.headers.get("authorization", "").encode()
            return await go_on(request) if hmac.compare_digest(given, expected) else _error(401, "the request carries no valid token")

    return front


def _refusal(request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        return _error(400, f"{'.'.join(map(str, first['loc'][1:])) or 'body'}: {first['msg']}")
    return _error(getattr(error, "status_code", 500), getattr(error, "message", None) or getattr(error, "detail", str(error)))


def _error(status: int, message: str) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": status}}, status_code=status)
