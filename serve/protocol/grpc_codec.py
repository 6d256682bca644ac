"""Requests and answers as protobuf messages."""

from __future__ import annotations

from collections.abc import Mapping

from app.errors import BadRequestError
from serve.protocol import open_inference_pb2 as pb
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
from serve.protocol.tensors import Tensor, from_contents, from_raw, header, to_raw


def decode_request(message: pb.ModelInferRequest) -> InferRequest:
    """Raises BadRequestError."""
    parameters = _parameters(message.parameters)
    check_parameters("request", parameters)
    return InferRequest(
        model=message.model_name,
        version=message.model_version,
        id=message.id,
        inputs=by_name(_inputs(message)),
        outputs=tuple(_output(output) for output in message.outputs),
        alone=flag("request", parameters, "alone"),
        timeout_seconds=timeout_seconds(parameters),
    )


def encode_response(response: InferResponse) -> pb.ModelInferResponse:
    """Outputs travel raw."""
    identity = response.identity
    message = pb.ModelInferResponse(model_name=identity.name, model_version=identity.version, id=response.id)
    message.parameters["weights_hash"].string_param = identity.weights_hash
    for tensor in response.outputs:
        message.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        message.raw_output_contents.append(to_raw(tensor))
    return message


def _inputs(message: pb.ModelInferRequest) -> list[Tensor]:
    raw = message.raw_input_contents
    if raw and len(raw) != len(message.inputs):
        raise BadRequestError(f"{len(message.inputs)} inputs need as many raw_input_contents, not {len(raw)}")
    tensors = []
    for index, entry in enumerate(message.inputs):
        check_parameters(f"tensor {entry.name!r}", _parameters(entry.parameters))
        head = header(entry.name, entry.datatype, entry.shape)
        if raw and entry.HasField("contents"):
            raise head.refuse("has both raw and typed contents")
        tensors.append(from_raw(head, raw[index]) if raw else from_contents(head, entry.contents))
    return tensors


def _output(entry: pb.ModelInferRequest.InferRequestedOutputTensor) -> RequestedOutput:
    check_parameters(f"output {entry.name!r}", _parameters(entry.parameters))
    return RequestedOutput(entry.name)


def _parameters(fields: Mapping[str, pb.InferParameter]) -> dict[str, Parameter]:
    chosen = {name: (value, value.WhichOneof("parameter_choice")) for name, value in fields.items()}
    return {name: getattr(value, field) for name, (value, field) in chosen.items() if field}
