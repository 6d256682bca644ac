"""Bodies of the HTTP door that are no part of the inference protocol, and what its OpenAPI page says."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, StrictBool, Tag

from app.config.serving import ServingConfig
from serve.protocol.messages import InferResponse

TokenId = Annotated[int, Field(ge=0, lt=2**31, strict=True)]

_SHARED = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Failure(BaseModel):
    """Why a request was refused or failed."""

    error: str


class IndexRequest(BaseModel):
    """Which models of the repository are listed."""

    ready: StrictBool = False
    """Only those that can answer."""


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
