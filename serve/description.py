"""What the service and its models say of themselves, in the protocol's terms; as pydantic models, which both doors write."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from pydantic import BaseModel, Field

from app.config.serving import ModelKind
from app.errors import ScoringError
from app.workers.scoring_messages import ModelDescription
from serve.gateway import Gateway
from serve.protocol.sequences import IDS, MASK, TEXT

SERVER = "corral"
EXTENSIONS = ("binary_tensor_data", "model_configuration", "model_repository")
PLATFORM = "corral_scoring"


@dataclass(frozen=True)
class TensorInfo:
    """shape: without the batch's dimension; -1 is any size. optional: may be left out of a request."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    optional: bool = False


INPUTS = (TensorInfo(IDS, "INT32", (-1,), True), TensorInfo(MASK, "INT32", (-1,), True), TensorInfo(TEXT, "BYTES", (1,), True))
"""All optional: a request has either ids, with or without a mask, or text."""


def outputs(kind: ModelKind, vocabulary: int) -> tuple[TensorInfo, ...]:
    """Rewards have one value per sequence and no dimension of their own."""
    if kind == "reward":
        return (TensorInfo("rewards", "FP32", ()),)
    return (TensorInfo("logprobs", "FP32", (-1,)), TensorInfo("logits", "FP16", (-1, vocabulary)))


def server_version() -> str:
    """Of the installed package; a source tree that is not installed has none."""
    try:
        return version("corral-rlhf")
    except PackageNotFoundError:
        return "source"


class TensorMetadata(BaseModel):
    """-1 is any size."""

    name: str
    datatype: str
    shape: list[int]


class ServerMetadata(BaseModel):
    name: str = SERVER
    version: str = Field(default_factory=server_version)
    extensions: list[str] = list(EXTENSIONS)


class ModelMetadata(BaseModel):
    name: str
    versions: list[str]
    platform: str = PLATFORM
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]

    @classmethod
    def of(cls, description: ModelDescription) -> ModelMetadata:
        """Shapes with the batch's dimension in front."""
        return cls(
            name=description.identity.name,
            versions=[description.identity.version],
            inputs=[_metadata(tensor) for tensor in INPUTS],
            outputs=[_metadata(tensor) for tensor in outputs(description.kind, description.vocabulary)],
        )


def _metadata(tensor: TensorInfo) -> TensorMetadata:
    return TensorMetadata(name=tensor.name, datatype=tensor.datatype, shape=[-1, *tensor.shape])


def model_config(description: ModelDescription, max_sequences: int) -> dict[str, Any]:
    """The part of Triton's model configuration that has a meaning here; dims without the batch's dimension."""

    def entry(tensor: TensorInfo) -> dict[str, Any]:
        data_type = "TYPE_STRING" if tensor.datatype == "BYTES" else f"TYPE_{tensor.datatype}"
        return {"name": tensor.name, "data_type": data_type, "dims": list(tensor.shape)}

    return {
        "name": description.identity.name,
        "platform": PLATFORM,
        "backend": SERVER,
        "max_batch_size": max_sequences,
        "input": [{**entry(tensor), "optional": tensor.optional} for tensor in INPUTS],
        "output": [entry(tensor) for tensor in outputs(description.kind, description.vocabulary)],
        "parameters": {name: {"string_value": value} for name, value in described_parameters(description).items()},
    }


def described_parameters(description: ModelDescription) -> dict[str, str]:
    """What a model configuration tells beside tensors."""
    return {
        "kind": description.kind,
        "version": description.identity.version,
        "weights_hash": description.identity.weights_hash,
        "vocabulary": str(description.vocabulary),
        "context": "" if description.context is None else str(description.context),
    }


class IndexEntry(BaseModel):
    name: str
    version: str = ""
    state: Literal["READY", "UNAVAILABLE"]
    reason: str = ""


async def repository_index(gateway: Gateway, *, ready: bool) -> list[IndexEntry]:
    """All models, or those that can answer."""
    entries = [await _index_entry(gateway, name) for name in gateway.names]
    return [entry for entry in entries if entry.state == "READY" or not ready]


async def _index_entry(gateway: Gateway, name: str) -> IndexEntry:
    try:
        return IndexEntry(name=name, version=(await gateway.describe(name)).identity.version, state="READY")
    except ScoringError as error:
        return IndexEntry(name=name, state="UNAVAILABLE", reason=str(error))
