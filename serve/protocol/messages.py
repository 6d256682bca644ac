"""A request and its answer, whichever way they travel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from app.errors import BadRequestError
from app.workers.scoring_messages import ModelIdentity
from serve.protocol.tensors import Tensor

Parameter = bool | int | float | str

UNSUPPORTED = ("shared_memory_region", "classification", "sequence_id")
"""Parameters of Triton's extensions that change what an answer means, and that this service does not have."""


@dataclass(frozen=True)
class RequestedOutput:
    """binary: as bytes behind the JSON (HTTP only)."""

    name: str
    binary: bool = False


@dataclass(frozen=True)
class InferRequest:
    """version: empty for whichever is served; outputs: empty for the model's usual ones; binary_output: how those travel.

    alone: share no forward pass with other callers; timeout_seconds: the caller's own deadline.
    """

    model: str
    version: str
    id: str
    inputs: Mapping[str, Tensor]
    outputs: tuple[RequestedOutput, ...] = ()
    binary_output: bool = False
    alone: bool = False
    timeout_seconds: float | None = None


@dataclass(frozen=True)
class InferResponse:
    """lengths: tokens of each sequence, without padding; binary: outputs that travel as bytes behind the JSON (HTTP only)."""

    identity: ModelIdentity
    id: str
    outputs: tuple[Tensor, ...]
    lengths: tuple[int, ...]
    binary: frozenset[str] = frozenset()


def check_parameters(where: str, parameters: Mapping[str, Parameter]) -> None:
    """Raises BadRequestError for a parameter that would be ignored at the caller's cost."""
    for name in UNSUPPORTED:
        if parameters.get(name):
            raise BadRequestError(f"{where}: parameter {name!r} is not supported by this service")


def flag(where: str, parameters: Mapping[str, Parameter], name: str, default: bool = False) -> bool:
    """A boolean parameter."""
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise BadRequestError(f"{where}: parameter {name!r} is true or false, not {str(value)[:40]!r}")
    return value


def timeout_seconds(parameters: Mapping[str, Parameter]) -> float | None:
    """The protocol's `timeout` parameter, which is in microseconds; 0 and absence mean none."""
    value = parameters.get("timeout", 0)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise BadRequestError(f"parameter 'timeout' is a number of microseconds, not {str(value)[:40]!r}")
    return value / 1e6 if value else None


def by_name(tensors: list[Tensor]) -> dict[str, Tensor]:
    """Inputs by name. Raises BadRequestError for none, or two of one name."""
    named = {tensor.name: tensor for tensor in tensors}
    if not named:
        raise BadRequestError("the request has no inputs")
    if len(named) < len(tensors):
        raise BadRequestError("two inputs have the same name")
    return named
