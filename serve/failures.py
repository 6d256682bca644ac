"""What a failure is called outside: one table from our errors to HTTP and gRPC codes."""

from __future__ import annotations

from dataclasses import dataclass

import grpc
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException

from app.errors import (
    BadRequestError,
    ModelNotFoundError,
    NotReadyError,
    OverloadedError,
    ScoringError,
    ScoringTimeoutError,
    TooLongError,
    UnauthorizedError,
    first_line,
)


@dataclass(frozen=True)
class Codes:
    http: int
    grpc: grpc.StatusCode


CODES: dict[type[ScoringError], Codes] = {
    TooLongError: Codes(413, grpc.StatusCode.OUT_OF_RANGE),
    BadRequestError: Codes(400, grpc.StatusCode.INVALID_ARGUMENT),
    UnauthorizedError: Codes(401, grpc.StatusCode.UNAUTHENTICATED),
    ModelNotFoundError: Codes(404, grpc.StatusCode.NOT_FOUND),
    OverloadedError: Codes(429, grpc.StatusCode.RESOURCE_EXHAUSTED),
    NotReadyError: Codes(503, grpc.StatusCode.UNAVAILABLE),
    ScoringTimeoutError: Codes(504, grpc.StatusCode.DEADLINE_EXCEEDED),
    ScoringError: Codes(500, grpc.StatusCode.INTERNAL),
}
"""Derived classes stand before their bases."""


def codes(error: ScoringError) -> Codes:
    """The codes of an error's class, or of the nearest class that it derives from."""
    return next(code for kind, code in CODES.items() if isinstance(error, kind))


def retry_after(error: ScoringError) -> str | None:
    """Seconds after which to ask again, as HTTP writes them (whole, at least 1); None where asking again is no use."""
    if isinstance(error, OverloadedError):
        return str(max(1, round(error.retry_after)))
    return "1" if isinstance(error, NotReadyError) else None


def as_scoring_error(error: BaseException, model: str) -> ScoringError:
    """An error of a call to a replica, as one of ours."""
    if isinstance(error, RayTaskError):
        error = error.cause
    if isinstance(error, ScoringError):
        return error
    if isinstance(error, BackPressureError):
        return OverloadedError(f"model {model}: more requests wait than the service holds; ask again")
    if isinstance(error, RayError | RayServeException):  # the replica died, or there is none
        return NotReadyError(f"model {model}: no replica answers ({type(error).__name__}); ask again")
    return ScoringError(f"model {model} failed: {type(error).__name__}: {first_line(error)}")
