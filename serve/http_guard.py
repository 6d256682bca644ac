"""In front of every HTTP request: who asks, how much is read, and a line in the access log."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable, MutableMapping
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import BadRequestError, ScoringError, ScoringTimeoutError, TooLongError, UnauthorizedError
from serve.access_log import Entry
from serve.byte_budget import LONGEST_REQUESTS, ByteBudget
from serve.credentials import Credentials
from serve.failures import codes, retry_after

OPEN_PATHS = frozenset({"/v2/health/live", "/v2/health/ready"})
"""Answered without a token. The OpenAPI page is not: it names the models."""

BODY_SECONDS = 60.0
"""How long a body may take to arrive."""

GONE = "499"
"""Status in the log of a request whose caller went away before the answer."""


Content = Callable[[int, str], dict[str, Any]]
"""The JSON of an answer that says why there is none, from its status and the reason."""


def plain(status: int, reason: str) -> dict[str, Any]:
    """What clients of the Open Inference Protocol understand."""
    return {"error": reason}


class ClientGoneError(Exception):
    """The caller closed the connection before the whole body had arrived."""


class Guard:
    """ASGI middleware. The application behind it gets the whole body, decompressed, and an `Entry` of the log in its state."""

    def __init__(
        self, app: ASGIApp, *, credentials: Credentials, max_bytes: int, budget: ByteBudget | None = None, content: Content = plain
    ) -> None:
        self._app = app
        self._content = content
        self._credentials = credentials
        self._max_bytes = max_bytes
        self._budget = budget or ByteBudget(LONGEST_REQUESTS * max_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        # Serve's proxy gives a request its id where the caller gave none, and answers with it.
        entry = Entry("http", f"{scope['method']} {scope['path']}", headers.get("x-request-id", ""), status=GONE)
        scope.setdefault("state", {})["entry"] = entry

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                entry.status = str(message["status"])
            await send(message)

        try:
            if scope["path"].removeprefix(scope.get("root_path", "")) not in OPEN_PATHS:
                self._credentials.check(headers.get("authorization"))
            with self._budget.holding() as take:
                body = await read_body(receive, headers, self._max_bytes, take)
                await self._app(_without_encoding(scope), _replaying(body, receive), noting)
        except ScoringError as error:
            await failure(error, entry, self._content)(scope, receive, noting)
        except ClientGoneError:
            return None
        finally:
            entry.write()
        return None


def failure(error: ScoringError, entry: Entry | None = None, content: Content = plain) -> JSONResponse:
    """The answer that says why there is none."""
    if entry:
        entry.reason = str(error)
    headers = {}
    if isinstance(error, UnauthorizedError):
        headers["WWW-Authenticate"] = "Bearer"
    pause = retry_after(error)
    if pause:
        headers["Retry-After"] = pause
    status = codes(error).http
    return JSONResponse(content(status, str(error)), status, headers)


async def read_body(receive: Receive, headers: Headers, max_bytes: int, take: Callable[[int], None]) -> bytes:
    """The whole body, decompressed; `take` is told of all bytes. Raises TooLongError before more than `max_bytes` are held,
    BadRequestError, OverloadedError, ScoringTimeoutError and ClientGoneError."""
    length = headers.get("content-length", "0")
    if length.isascii() and length.isdigit() and int(length[:20]) > max_bytes:
        raise _too_long(max_bytes)
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGoneError
                chunks.append(message.get("body", b""))
                size += len(chunks[-1])
                if size > max_bytes:
                    raise _too_long(max_bytes)
                take(len(chunks[-1]))
                if not message.get("more_body"):
                    break
    except TimeoutError:
        raise ScoringTimeoutError(f"the body did not arrive within {BODY_SECONDS:g} s") from None
    body = b"".join(chunks)
    inflated = inflate(body, headers.get("content-encoding", "identity").lower(), max_bytes)
    take(max(0, len(inflated) - len(body)))
    return inflated


def inflate(body: bytes, encoding: str, max_bytes: int) -> bytes:
    """The body without its Content-Encoding. Raises TooLongError, having made no more than `max_bytes`, and BadRequestError."""
    if encoding == "identity":
        return body
    if encoding not in ("gzip", "deflate"):
        raise BadRequestError(f"Content-Encoding {encoding[:40]!r} is not understood; use gzip, deflate or none")
    decoder = zlib.decompressobj(zlib.MAX_WBITS | (16 if encoding == "gzip" else 0))
    try:
        inflated = decoder.decompress(body, max_bytes + 1)
    except zlib.error as error:
        raise BadRequestError(f"the body is not {encoding} ({error})") from None
    if len(inflated) > max_bytes:
        raise _too_long(max_bytes)
    if not decoder.eof or decoder.unused_data:
        raise BadRequestError(f"the {encoding} body is cut off, or something follows it")
    return inflated


def _too_long(max_bytes: int) -> TooLongError:
    return TooLongError(f"the request is longer than {max_bytes} bytes (serving.max_request_bytes): send fewer sequences at a time")


def _without_encoding(scope: Scope) -> MutableMapping[str, Any]:
    return {**scope, "headers": [(name, value) for name, value in scope["headers"] if name.lower() != b"content-encoding"]}


def _replaying(body: bytes, receive: Receive) -> Receive:
    """The body once, then whatever comes on the connection (its end)."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay
