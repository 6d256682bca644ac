"""The gRPC door: a server of its own inside the doors' process.

Serve's gRPC proxy is not used, for three reasons. With a second application on the cluster (chat is one) it answers only callers
that send `application` metadata, which stock Triton clients do not. It listens on every interface, whatever the host. And it
takes messages of any length. A server of our own also saves a hop: caller, door, model. It listens with SO_REUSEPORT, so that a
new door takes over the port from the old one while that one finishes what it has; several doors of one node share the load.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import grpc
from google.protobuf.json_format import ParseDict
from google.protobuf.message import DecodeError, Message

from app.errors import BadRequestError, ConfigError, ScoringError, first_line
from serve.access_log import Entry
from serve.byte_budget import ByteBudget
from serve.credentials import Credentials
from serve.description import EXTENSIONS, SERVER, ModelMetadata, model_config, repository_index, server_version
from serve.failures import codes, retry_after
from serve.gateway import Gateway
from serve.protocol import open_inference_pb2 as pb
from serve.protocol.grpc_codec import decode_request, encode_response

SERVICE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]

OPEN_METHODS = frozenset({"ServerLive", "ServerReady"})
"""Answered without a token."""

MAX_CONCURRENT = 1024
"""Calls at a time; more are refused as RESOURCE_EXHAUSTED."""

LONGEST_REASON = 2048
"""Characters of an error that are sent: they travel in HTTP/2 trailers, which are short."""

Method = Callable[[Any, Entry], Awaitable[Message]]


class GrpcDoor:
    """Answers the protocol's calls on `host:port` from `start` to `stop`."""

    def __init__(self, gateway: Gateway, credentials: Credentials, budget: ByteBudget, *, max_bytes: int) -> None:
        self._gateway = gateway
        self._credentials = credentials
        self._budget = budget
        self._max_bytes = max_bytes
        self._server: grpc.aio.Server | None = None

    async def start(self, host: str, port: int) -> int:
        """The port, which is a free one for 0. Raises ConfigError when it cannot listen there."""
        asyncio.get_running_loop().set_exception_handler(_without_idle_polls)
        server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", self._max_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 1),
            ],
            maximum_concurrent_rpcs=MAX_CONCURRENT,
        )
        handlers = {name: grpc.unary_unary_rpc_method_handler(self._handler(name, method)) for name, method in self._methods().items()}
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE.full_name, handlers)])
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            bound: int = server.add_insecure_port(address)
        except RuntimeError as error:
            raise ConfigError(f"serving.grpc_port = {port}: cannot listen on {address} ({first_line(error)}); choose another") from error
        await server.start()
        self._server = server
        return bound

    async def stop(self, grace_seconds: float) -> None:
        """Take no new calls, and give those in flight `grace_seconds`. A call that arrives at this very moment on an open channel ends
        as CANCELLED (grpc's server cannot tell its clients to go before it stops listening); the channel then finds the new door."""
        if self._server is not None:
            await self._server.stop(grace_seconds)

    def _methods(self) -> Mapping[str, Method]:
        return {
            "ServerLive": self._server_live,
            "ServerReady": self._server_ready,
            "ModelReady": self._model_ready,
            "ServerMetadata": self._server_metadata,
            "ModelMetadata": self._model_metadata,
            "ModelConfig": self._model_config,
            "RepositoryIndex": self._repository_index,
            "ModelInfer": self._model_infer,
        }

    def _handler(self, name: str, method: Method) -> Callable[[bytes, Any], Awaitable[bytes]]:
        """From bytes to bytes: what all methods do alike with the message, the token, the log and errors."""
        request_class = getattr(pb, SERVICE.methods_by_name[name].input_type.name)

        async def answer(data: bytes, context: Any) -> bytes:
            metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
            entry = Entry("grpc", name, metadata.get("x-request-id", ""), status=grpc.StatusCode.CANCELLED.name)
            trailers: tuple[tuple[str, str], ...] = (("x-request-id", entry.request_id),) if entry.request_id else ()
            try:
                if name not in OPEN_METHODS:
                    self._credentials.check(metadata.get("authorization"))
                with self._budget.holding() as take:
                    take(len(data))
                    reply = await method(_parse(request_class, data), entry)
                context.set_trailing_metadata(trailers)
                entry.status = grpc.StatusCode.OK.name
                return reply.SerializeToString()
            except ScoringError as error:
                code = codes(error).grpc
                entry.status, entry.reason = code.name, str(error)
                pause = retry_after(error)
                if pause:
                    trailers += (("retry-after", pause),)
                await context.abort(code, str(error)[:LONGEST_REASON], trailers)
                raise  # not reached: abort raises what ends the call
            finally:
                entry.write()

        return answer

    async def _server_live(self, request: pb.ServerLiveRequest, entry: Entry) -> Message:
        return pb.ServerLiveResponse(live=True)

    async def _server_ready(self, request: pb.ServerReadyRequest, entry: Entry) -> Message:
        return pb.ServerReadyResponse(ready=all([await self._gateway.ready(name) for name in self._gateway.names]))

    async def _model_ready(self, request: pb.ModelReadyRequest, entry: Entry) -> Message:
        return pb.ModelReadyResponse(ready=await self._gateway.ready(request.name, request.version))

    async def _server_metadata(self, request: pb.ServerMetadataRequest, entry: Entry) -> Message:
        return pb.ServerMetadataResponse(name=SERVER, version=server_version(), extensions=EXTENSIONS)

    async def _model_metadata(self, request: pb.ModelMetadataRequest, entry: Entry) -> Message:
        description = await self._gateway.describe(request.name, request.version)
        return ParseDict(ModelMetadata.of(description).model_dump(), pb.ModelMetadataResponse())

    async def _model_config(self, request: pb.ModelConfigRequest, entry: Entry) -> Message:
        description = await self._gateway.describe(request.name, request.version)
        return ParseDict({"config": model_config(description, self._gateway.max_sequences)}, pb.ModelConfigResponse())

    async def _repository_index(self, request: pb.RepositoryIndexRequest, entry: Entry) -> Message:
        models = [each.model_dump() for each in await repository_index(self._gateway, ready=request.ready)]
        return ParseDict({"models": models}, pb.RepositoryIndexResponse())

    async def _model_infer(self, request: pb.ModelInferRequest, entry: Entry) -> Message:
        entry.model = request.model_name[:128]
        response = await self._gateway.infer(decode_request(request), entry.request_id)
        entry.answered(response)
        return encode_response(response)


def _parse(request_class: type[Message], data: bytes) -> Message:
    try:
        return request_class.FromString(data)
    except DecodeError as error:
        raise BadRequestError(f"the message is no {request_class.__name__} ({first_line(error)})") from None


def _without_idle_polls(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """grpc.aio shares one poller among the event loops of a process, of which a replica of Serve has two: a loop that finds nothing
    to read is no error."""
    error = context.get("exception")
    if not (isinstance(error, BlockingIOError) and error.errno == errno.EAGAIN and "PollerCompletionQueue" in context.get("message", "")):
        loop.default_exception_handler(context)
