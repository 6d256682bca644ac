"""Bodies of the HTTP door beside those of the inference protocol; they make its OpenAPI page."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, StrictBool, Tag

from app.config.serving import ServingConfig
from app.errors import ScoringError
from app.workers.scoring_messages import ModelDescription
from serve.description import EXTENSIONS, INPUTS, PLATFORM, SERVER, TensorInfo, outputs, server_version
from serve.gateway import Gateway
from serve.protocol.messages import InferResponse

TokenId = Annotated[int, Field(ge=0, lt=2**31, strict=True)]

_SHARED = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Failure(BaseModel):
    """Why a request was refused or failed."""

    error: str


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


class IndexRequest(BaseModel):
    """Which models of the repository are listed."""

    ready: StrictBool = False
    """Only those that can answer."""


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


class ChatMessage(BaseModel):
    model_config = _SHARED
    role: Literal["system", "user", "assistant"]
    content: str


class ScoreIds(BaseModel):
    """Token ids to be scored by one model."""

    model_config = _SHARED
    model: str
    """A model's name."""
    ids: list[Annotated[list[TokenId], Field(min_length=1)]] = Field(min_length=1)
    """Token ids of each sequence."""


class ScoreConversations(BaseModel):
    """Conversations to be scored by one model."""

    model_config = _SHARED
    model: str
    """A model's name."""
    messages: list[Annotated[list[ChatMessage], Field(min_length=1)]] = Field(min_length=1)
    """Each conversation is rendered by the model's chat template."""


def _what_is_sent(body: object) -> str:
    """So that a mistake is told in the terms of what was meant."""
    return "ids" if isinstance(body, ScoreIds) or (isinstance(body, dict) and "ids" in body) else "messages"


ScoreRequest = Annotated[
    Annotated[ScoreIds, Tag("ids")] | Annotated[ScoreConversations, Tag("messages")],
    Discriminator(_what_is_sent),
]


class ScoreAnswer(BaseModel):
    """The answer, and the weights that it is from."""

    model_config = ConfigDict(use_attribute_docstrings=True)
    model: str
    version: str
    weights_hash: str
    tokens: list[int]
    """Of each sequence."""
    rewards: list[float] | None = None
    """Of a reward model: one score per sequence."""
    logprobs: list[list[float]] | None = None
    """Of a reference policy: entry t of a sequence is log p(token t+1 | tokens ..t)."""

    @classmethod
    def of(cls, response: InferResponse) -> ScoreAnswer:
        """The one output of a response, without padding."""
        (output,) = response.outputs
        rows = output.array.tolist()
        identity = response.identity
        return cls(
            model=identity.name,
            version=identity.version,
            weights_hash=identity.weights_hash,
            tokens=list(response.lengths),
            rewards=rows if output.name == "rewards" else None,
            logprobs=[row[: length - 1] for row, length in zip(rows, response.lengths, strict=True)] if output.name == "logprobs" else None,
        )


def openapi_note(config: ServingConfig) -> str:
    """What the OpenAPI page says of the service."""
    return (
        "Scores of reward models and log-probs of reference policies, over the Open Inference Protocol v2 and, in plain JSON, /score. "
        f"A request has at most {config.max_request_bytes} bytes and {config.max_request_sequences} sequences."
    )
