"""Requests and answers over HTTP: JSON, and the binary-tensor extension (bytes of tensors behind a JSON header, whose
length stands in the HTTP header Inference-Header-Content-Length)."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app.errors import BadRequestError
from serve.protocol.messages import (
    InferRequest,
    InferResponse,
    Parameter,
    RequestedOutput,
    by_name,
    check_parameters,
    flag,
    timeout_seconds,
)
from serve.protocol.tensors import Tensor, from_json, from_raw, header, to_json, to_raw

HEADER_LENGTH = "Inference-Header-Content-Length"
"""Name of the HTTP header that says where the JSON ends and the tensors' bytes begin."""

_SHARED = ConfigDict(strict=True, extra="ignore", frozen=True)


class InputTensor(BaseModel):
    """`data` holds the values; or `parameters.binary_data_size` says how many bytes of the body, in the order of the inputs."""

    model_config = _SHARED
    name: str
    datatype: str = Field(examples=["INT32"])
    shape: list[int]
    parameters: dict[str, Parameter] = Field(default_factory=dict)
    data: list[Any] | None = None


class OutputTensor(BaseModel):
    """An output by name; `parameters.binary_data` asks for bytes."""

    model_config = _SHARED
    name: str
    parameters: dict[str, Parameter] = Field(default_factory=dict)


_EXAMPLE: Any = {"inputs": [{"name": "input_ids", "datatype": "INT32", "shape": [1, 3], "data": [5, 6, 7]}]}


class InferBody(BaseModel):
    """The JSON of an inference request."""

    model_config = {**_SHARED, "json_schema_extra": {"examples": [_EXAMPLE]}}
    id: str = ""
    parameters: dict[str, Parameter] = Field(default_factory=dict)
    inputs: list[InputTensor]
    outputs: list[OutputTensor] = Field(default_factory=list)


def decode_request(model: str, version: str, body: bytes, header_length: str | None) -> InferRequest:
    """A request from its body and, if it came with one, the value of HEADER_LENGTH. Raises BadRequestError."""
    end = _header_end(header_length, len(body))
    parsed = _parse(body[:end])
    check_parameters("request", parsed.parameters)
    binary_output = flag("request", parsed.parameters, "binary_data_output")
    return InferRequest(
        model=model,
        version=version,
        id=parsed.id,
        inputs=by_name(_inputs(parsed.inputs, memoryview(body)[end:])),
        outputs=tuple(_output(output, binary_output) for output in parsed.outputs),
        binary_output=binary_output,
        alone=flag("request", parsed.parameters, "alone"),
        timeout_seconds=timeout_seconds(parsed.parameters),
    )


def encode_response(response: InferResponse) -> tuple[bytes, int | None]:
    """The body, and the value of HEADER_LENGTH where bytes of tensors follow the JSON."""
    chunks: list[bytes] = []
    outputs: list[dict[str, Any]] = []
    for tensor in response.outputs:
        entry: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
        if tensor.name in response.binary:
            chunks.append(to_raw(tensor))
            entry["parameters"] = {"binary_data_size": len(chunks[-1])}
        else:
            entry["data"] = to_json(tensor)
        outputs.append(entry)
    identity = response.identity
    answer: dict[str, Any] = {
        "model_name": identity.name,
        "model_version": identity.version,
        "parameters": {"weights_hash": identity.weights_hash},
        "outputs": outputs,
    }
    if response.id:
        answer["id"] = response.id
    text = json.dumps(answer, allow_nan=False).encode()
    return b"".join([text, *chunks]), len(text) if chunks else None


def _header_end(header_length: str | None, size: int) -> int:
    if header_length is None:
        return size
    if not (header_length.isascii() and header_length.isdigit() and len(header_length) < 20):
        raise BadRequestError(f"{HEADER_LENGTH} is a number of bytes, not {header_length[:40]!r}")
    if int(header_length) > size:
        raise BadRequestError(f"{HEADER_LENGTH} is {header_length}, but the body has {size} bytes")
    return int(header_length)


def _parse(text: bytes) -> InferBody:
    try:
        return InferBody.model_validate_json(text)
    except ValidationError as error:
        raise BadRequestError(f"the request's JSON is refused: {first_reason(error)}") from None


def first_reason(error: ValidationError) -> str:
    """Where and why, of the first of its errors."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(str(part) for part in first["loc"])[:200]
    return f"{place}: {first['msg']}" if place else first["msg"]


def _inputs(entries: list[InputTensor], rest: memoryview) -> list[Tensor]:
    """Tensors in order; each takes its bytes off the rest of the body, and nothing may be left over."""
    tensors = []
    for entry in entries:
        check_parameters(f"tensor {entry.name!r}", entry.parameters)
        head = header(entry.name, entry.datatype, entry.shape)
        size = entry.parameters.get("binary_data_size")
        if (size is None) == (entry.data is None):
            raise head.refuse("needs either `data` or the parameter `binary_data_size`")
        if entry.data is not None:
            tensors.append(from_json(head, entry.data))
            continue
        if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= len(rest):
            raise head.refuse(f"binary_data_size is {str(size)[:40]}, but {len(rest)} bytes are left of the body")
        tensors.append(from_raw(head, rest[:size]))
        rest = rest[size:]
    if len(rest):
        raise BadRequestError(f"{len(rest)} bytes behind the JSON belong to no tensor")
    return tensors


def _output(entry: OutputTensor, default: bool) -> RequestedOutput:
    where = f"output {entry.name!r}"
    check_parameters(where, entry.parameters)
    return RequestedOutput(entry.name, flag(where, entry.parameters, "binary_data", default))
