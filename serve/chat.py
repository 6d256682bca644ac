"""Chat with the result: OpenAI's protocol over vLLM engines, by Ray Serve LLM, as one more application of the same Serve.

Importing ray.serve.llm loads vLLM, which takes long: it is imported where an application is built, and in its replicas.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from ray import serve
from ray.llm._internal.common.callbacks.base import CallbackBase
from starlette.responses import JSONResponse

from app.config.serving import DOORS, ChatModelConfig, ServingConfig
from app.errors import ConfigError
from app.models.context import context_of
from app.models.heads import Precision
from app.models.load import check_language_model, load_config, seen_from_anywhere
from app.planning.memory import WIDTHS
from app.planning.shapes import cache_bytes
from app.workers.engine_settings import DTYPES, ENGINE_VARIABLES, cpu_settings
from app.workers.processes import process_environment
from serve import access_log
from serve.byte_budget import LONGEST_REQUESTS, ByteBudget
from serve.credentials import Credentials
from serve.deploying import LOGGING, target
from serve.http_guard import Guard
from serve.scoring import versioned

APPLICATION, ROUTE = "chat", "/v1"
MAX_ONGOING_REQUESTS = 1024
"""Of the door and of each engine, which takes as many of them at a time as its KV cache holds."""


def check_chat_models(models: Mapping[str, ChatModelConfig], precision: Precision = "fp32", trust_remote_code: bool = False) -> None:
    """Raises ModelError or ConfigError for what cannot be chatted with, before anything is started."""
    for name, model in models.items():
        check_language_model(model.path, f"chat model {name} =")
        config = load_config(model.path, trust_remote_code).get_text_config().to_dict()
        needed = 0 if model.workers.gpus else cache_bytes(config, _length(model), WIDTHS[precision])
        if needed > model.kv_cache_gib * 2**30:  # vLLM would refuse too, a minute later and in a log
            raise ConfigError(
                f"serving.chat.{name}: a conversation of {_length(model)} tokens needs {needed / 2**30:.2g} GiB of KV cache, and "
                f"kv_cache_gib is {model.kv_cache_gib:g}: raise it, or lower max_model_len"
            )


def chat_application(
    config: ServingConfig, *, token: str | None = None, precision: Precision = "fp32", trust_remote_code: bool = False
) -> serve.Application:
    """The application of `config.chat`, not yet deployed, to run at ROUTE: `/v1/models`, `/v1/chat/completions`, `/v1/completions`.

    token: the bearer token that requests must carry (the clients' `api_key`).
    """
    with _own_logging():
        from ray.llm._internal.serve.core.configs.openai_api_models import to_model_metadata
        from ray.serve.llm.ingress import OpenAiIngress, make_fastapi_ingress

        engines = {name: _llm_config(name, model, precision, trust_remote_code) for name, model in config.chat.items()}
        servers = {name: _server(name, engine, (config.chat[name], precision, trust_remote_code)) for name, engine in engines.items()}
    credentials = Credentials.of(token)
    door = serve.deployment(
        make_fastapi_ingress(OpenAiIngress, endpoint_map=_ENDPOINTS, app=_front(config, credentials)),
        name=DOORS,
        num_replicas=1,
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        ray_actor_options={"num_cpus": 0},
    )
    cards = {name: to_model_metadata(name, engine) for name, engine in engines.items()}
    settled = (sorted(map(repr, cards.values())), config.max_request_bytes, config.access_log, credentials)
    return versioned(door, settled).bind(llm_deployments=servers, model_cards=cards)


def chat_target(application: serve.Application) -> serve.RunTarget:
    """The application under its name and route, to deploy beside others."""
    return target(application, APPLICATION, ROUTE)


_ENDPOINTS = {
    "models": lambda app: app.get("/models"),
    "model_data": lambda app: app.get("/models/{model:path}"),
    "chat": lambda app: app.post("/chat/completions"),
    "completions": lambda app: app.post("/completions"),
}


@contextmanager
def _own_logging() -> Iterator[None]:
    """Ray Serve LLM, when it is imported, replaces the process's log handlers by one that shows everything as JSON: undone here.
    What vLLM remarks on the machine as it is imported is left out; this process computes nothing."""
    root, libraries = logging.getLogger(), logging.getLogger("ray.serve")
    handlers, level, disabled = list(root.handlers), root.level, root.manager.disable
    libraries.setLevel(logging.WARNING)
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(disabled)
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

    workers, gpus, length = model.workers, model.workers.gpus, _length(model)
    settings = {"gpu_memory_utilization": model.gpu_memory_utilization} if gpus else cpu_settings(model.kv_cache_gib, length)
    return LLMConfig(
        model_loading_config={"model_id": name, "model_source": seen_from_anywhere(model.path)},
        accelerator_config={"kind": "gpu" if gpus else "cpu"},
        placement_group_config={"bundle_per_worker": {"CPU": 0.0, "GPU": gpus / workers.tensor_parallel}},
        deployment_config={
            "num_replicas": workers.count,
            "max_ongoing_requests": MAX_ONGOING_REQUESTS,
            "max_constructor_retry_count": 1,
            "ray_actor_options": {"num_cpus": workers.cpus},
            "logging_config": LOGGING.model_dump(),
        },
        engine_kwargs={
            "dtype": DTYPES[precision],
            "max_model_len": length,
            "enforce_eager": not gpus,
            "tensor_parallel_size": workers.tensor_parallel,
            "trust_remote_code": trust_remote_code,
            **settings,
        },
        callback_config={"callback_class": _NothingToFetch},
        runtime_env={"env_vars": process_environment(workers, **ENGINE_VARIABLES)},
    )


def _server(name: str, engine: Any, settled: object) -> serve.Application:
    """The deployment of an engine, named as its model."""
    from ray.serve.llm.deployment import LLMServer

    options = LLMServer.get_deployment_options(engine) | {"name": name}
    return versioned(serve.deployment(**options)(LLMServer), settled).bind(engine)


def _length(model: ChatModelConfig) -> int:
    """Tokens of the longest conversation."""
    return min(model.max_model_len, context_of(model.path) or model.max_model_len)


def _front(config: ServingConfig, credentials: Credentials) -> FastAPI:
    """The door's web application: the scorers' guard in front, and errors in OpenAI's form."""
    from ray.llm._internal.serve.core.configs.openai_api_models import OpenAIHTTPException

    front = FastAPI(
        title="Corral chat", description="OpenAI's chat protocol over vLLM engines.", lifespan=partial(_logged, config.access_log)
    )
    for kind in (HTTPException, OpenAIHTTPException, RequestValidationError, Exception):
        front.add_exception_handler(kind, _refusal)
    budget = ByteBudget(LONGEST_REQUESTS * config.max_request_bytes)
    front.add_middleware(Guard, credentials=credentials, max_bytes=config.max_request_bytes, budget=budget, content=_content)
    return front


@asynccontextmanager
async def _logged(file: str | None, front: FastAPI) -> AsyncIterator[None]:
    access_log.open_log(file)
    yield


def _refusal(request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        return _error(400, f"{'.'.join(map(str, first['loc'][1:])) or 'body'}: {first['msg']}")
    message = getattr(error, "message", None) or getattr(error, "detail", None)  # of OpenAI's and FastAPI's exceptions
    if message is None:
        return _error(500, f"the service failed ({type(error).__name__}); its log has the reason")
    return _error(getattr(error, "status_code", 500), str(message))


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse(_content(status, message), status)


def _content(status: int, message: str) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}
