"""The HTTP door: Open Inference Protocol v2 and `/score`, as a FastAPI application over a `Gateway`."""

# No postponed annotations here: FastAPI evaluates those of the routes, which name arguments of the functions around them.

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from app.config.serving import ServingConfig
from app.errors import NotReadyError, ScoringError
from serve.access_log import Entry
from serve.byte_budget import ByteBudget
from serve.credentials import Credentials
from serve.description import IndexEntry, ModelMetadata, ServerMetadata, model_config, repository_index, server_version
from serve.gateway import Gateway
from serve.http_guard import Guard, failure
from serve.http_models import (
    Failure,
    IndexRequest,
    ScoreAnswer,
    ScoreConversations,
    ScoreIds,
    ScoreRequest,
    openapi_note,
)
from serve.protocol.json_codec import HEADER_LENGTH, InferBody, decode_request, encode_response

FAILURES: dict[int | str, dict[str, Any]] = {code: {"model": Failure} for code in (400, 401, 404, 413, 422, 429, 500, 503, 504)}

BINARY = {"schema": {"type": "string", "format": "binary"}}
INFER_BODY = {
    "required": True,
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/InferBody"}}, "application/octet-stream": BINARY},
}
INFER_ANSWER = {"description": "Outputs of the model", "content": {"application/json": {}, "application/octet-stream": BINARY}}
"""The route reads and writes its bodies itself, since tensors may follow the JSON; this is what the OpenAPI page shows."""


@dataclass(frozen=True)
class Target:
    """Which model a path names; an empty version is whichever is served."""

    model: str
    version: str


def http_app(gateway: Gateway, config: ServingConfig, credentials: Credentials, budget: ByteBudget) -> FastAPI:
    """The application: routes, the errors' answers, and the `Guard` in front."""
    app = FastAPI(title="Corral scoring", version=server_version(), description=openapi_note(config), redoc_url=None, responses=FAILURES)
    add_server_routes(app, gateway)
    add_model_routes(app, gateway, "/v2/models/{model}", lambda model: Target(model, ""))
    add_model_routes(app, gateway, "/v2/models/{model}/versions/{version}", Target)
    add_score_route(app, gateway)

    async def scoring_failure(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ScoringError)
        return failure(error, _entry(request))

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc']))[:200]}: {first['msg']}"
        _entry(request).reason = reason
        return JSONResponse({"error": reason}, 422)

    async def broken(request: Request, error: Exception) -> JSONResponse:
        """A fault of ours: Starlette raises it again, so that it gets into the log with its trace."""
        return failure(ScoringError(f"the service failed ({type(error).__name__}); its log has the reason"), _entry(request))

    async def no_route(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        _entry(request).reason = error.detail
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    app.add_exception_handler(ScoringError, scoring_failure)
    app.add_exception_handler(HTTPException, no_route)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(Exception, broken)
    app.add_middleware(Guard, credentials=credentials, max_bytes=config.max_request_bytes, budget=budget)
    _document(app, gateway)
    return app


def _document(app: FastAPI, gateway: Gateway) -> None:
    """The OpenAPI page: the bodies that routes read themselves, and which models there are now."""
    page = app.openapi()
    schemas = page["components"]["schemas"]
    body = InferBody.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas.update({**body.pop("$defs"), "InferBody": body})
    parameters = [each for path in page["paths"].values() for operation in path.values() for each in operation.get("parameters", ())]
    named = [schemas[schema.__name__]["properties"]["model"] for schema in (ScoreIds, ScoreConversations)]
    named += [parameter["schema"] for parameter in parameters if parameter["name"] == "model"]

    def document() -> dict[str, Any]:
        for schema in named:
            schema["enum"] = gateway.names
        return page

    app.openapi = document  # type: ignore[method-assign]  # FastAPI's own way to change the page


def _entry(request: Request, model: str = "") -> Entry:
    """The request's line in the access log; `model`: who was asked, known before anybody answers."""
    entry: Entry = request.state.entry
    entry.model = model[:128] or entry.model
    return entry


def add_server_routes(app: FastAPI, gateway: Gateway) -> None:
    """The service as a whole."""

    @app.get("/v2/health/live", response_class=Response)
    async def live() -> Response:
        """Whether the service takes requests."""
        return Response()

    @app.get("/v2/health/ready", response_class=Response)
    async def ready() -> Response:
        """Whether every model can answer."""
        for name in gateway.names:
            await _require_ready(gateway, Target(name, ""))
        return Response()

    @app.get("/v2")
    async def server_metadata() -> ServerMetadata:
        """Name, version and extensions of the service."""
        return ServerMetadata()

    @app.post("/v2/repository/index")
    async def index(request: IndexRequest | None = None) -> list[IndexEntry]:
        """All models."""
        return await repository_index(gateway, ready=request is not None and request.ready)


async def _require_ready(gateway: Gateway, target: Target) -> None:
    if not await gateway.ready(target.model, target.version):
        raise NotReadyError(f"model {target.model} cannot answer yet; ask again")


def add_model_routes(app: FastAPI, gateway: Gateway, prefix: str, target: Callable[..., Target]) -> None:
    """One model: under its name, and once more under name and version. `target` reads a path's parameters."""

    @app.get(f"{prefix}/ready", response_class=Response)
    async def ready(at: Annotated[Target, Depends(target)]) -> Response:
        """Whether the model can answer."""
        await _require_ready(gateway, at)
        return Response()

    @app.get(prefix)
    async def metadata(at: Annotated[Target, Depends(target)]) -> ModelMetadata:
        """The model's inputs and outputs."""
        return ModelMetadata.of(await gateway.describe(at.model, at.version))

    @app.get(f"{prefix}/config")
    async def config(at: Annotated[Target, Depends(target)]) -> dict[str, Any]:
        """The model's configuration, as Triton writes it."""
        return model_config(await gateway.describe(at.model, at.version), gateway.max_sequences)

    @app.post(f"{prefix}/infer", response_class=Response, responses={200: INFER_ANSWER}, openapi_extra={"requestBody": INFER_BODY})
    async def infer(request: Request, at: Annotated[Target, Depends(target)]) -> Response:
        """Scores or log-probs of `input_ids` (with `attention_mask`) or `text`. Tensors may follow the JSON as bytes: then the header
        Inference-Header-Content-Length says where it ends."""
        decoded = decode_request(at.model, at.version, await request.body(), request.headers.get(HEADER_LENGTH))
        entry = _entry(request, at.model)
        response = await gateway.infer(decoded, entry.request_id)
        entry.answered(response)
        body, header_length = encode_response(response)
        headers = {"Corral-Model-Version": quote(response.identity.version), "Corral-Weights-Hash": response.identity.weights_hash}
        if header_length is None:
            return Response(body, media_type="application/json", headers=headers)
        return Response(body, media_type="application/octet-stream", headers={**headers, HEADER_LENGTH: str(header_length)})


def add_score_route(app: FastAPI, gateway: Gateway) -> None:
    """The plain face of the service."""

    @app.post("/score")
    async def score(body: ScoreRequest, request: Request) -> ScoreAnswer:
        """Scores (of a reward model) or log-probs (of a reference policy) of conversations or token ids."""
        entry = _entry(request, body.model)
        if isinstance(body, ScoreIds):
            response = await gateway.score_ids(body.model, body.ids, entry.request_id)
        else:
            conversations = [[message.model_dump() for message in messages] for messages in body.messages]
            response = await gateway.score_conversations(body.model, conversations, entry.request_id)
        entry.answered(response)
        return ScoreAnswer.of(response)
