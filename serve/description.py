"""What the service and its models say of themselves, in the protocol's terms and independent of the transport."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from app.config.serving import ModelKind
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
