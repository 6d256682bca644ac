"""What travels between a scoring client and a replica of a model: arrays through Ray's object store, no conversion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from app.config.serving import ModelKind, Output
from app.experience import IntArray


@dataclass(frozen=True)
class ScoringRequest:
    """Sequences of one caller.

    ids: int32, all sequences in a row; lengths: int32, one per sequence; output: what is asked for.
    alone: compute these sequences in batches of their own, of the same composition every time, for answers that are equal bit for bit.
    client: who asks; clients that wait for the same replica take turns.
    """

    ids: IntArray
    lengths: IntArray
    output: Output
    alone: bool = False
    request_id: str = ""
    client: str = ""


@dataclass(frozen=True)
class ModelIdentity:
    """Which weights answered. weights_hash: hex digest over the loaded weights, see `ScoringModel`."""

    name: str
    version: str
    weights_hash: str


@dataclass(frozen=True)
class ScoringAnswer:
    """values: answers of the request's sequences, concatenated along the first axis, see `Output`. The whole answer is of `model`."""

    values: np.ndarray[Any, np.dtype[Any]]
    model: ModelIdentity


@dataclass(frozen=True)
class ModelDescription:
    """What a served model is. context: longest sequence, None where the model has no limit; vocabulary: ids are below it.

    path: folder of the weights and the tokenizer; timeout_seconds: deadline of one request; refused: why the replica could not take
    the weights that it was last asked to, empty where it did.
    """

    identity: ModelIdentity
    kind: ModelKind
    vocabulary: int
    context: int | None
    path: str = ""
    timeout_seconds: float = 60.0
    refused: str = ""
