"""Padded batches <-> sequences in a row.

B sequences of a request, T tokens in the widest row, N tokens without padding, V entries of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from app.config.serving import Output
from app.errors import BadRequestError
from app.experience import IntArray
from serve.protocol.tensors import Array, Tensor

IDS, MASK, TEXT = "input_ids", "attention_mask", "text"
"""Names of the inputs."""

INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class Sequences:
    """ids_N: int32, without padding. mask_BT: where in the padded batch they stand, True in one run per row."""

    ids_N: IntArray
    mask_BT: np.ndarray[Any, np.dtype[np.bool_]]

    @property
    def lengths_B(self) -> IntArray:
        return self.mask_BT.sum(axis=1, dtype=np.int32)

    def spread(self, output: Output, values: Array) -> Tensor:
        """An answer's values as the tensor that the caller gets: rewards [B], logprobs [B, T-1], logits [B, T, V]; 0 where masked."""
        rows, width = self.mask_BT.shape
        if output == "rewards":
            return Tensor(output, "FP32", values.reshape(rows))
        if output == "logits":
            return Tensor(output, "FP16", _filled(self.mask_BT, values, np.float16))
        predicted = self.mask_BT[:, 1:] & self.mask_BT[:, : width - 1]  # both the token and what it follows are real
        return Tensor(output, "FP32", _filled(predicted, values, np.float32))


def from_rows(rows: list[list[int]]) -> Sequences:
    """Sequences from lists of ids, as if they were padded on the right. Raises BadRequestError."""
    if not rows or not all(rows):
        raise BadRequestError("no sequences, or one without a token")
    lengths_B = np.array([len(row) for row in rows])
    ids_N = np.array([token for row in rows for token in row], dtype=np.int64)
    return Sequences(_as_int32(ids_N), np.arange(lengths_B.max()) < lengths_B[:, None])


def from_tensors(inputs: Mapping[str, Tensor], max_sequences: int) -> Sequences:
    """Sequences from `input_ids` and `attention_mask` (1 = real; default: all), both INT32 or INT64 [B, T], padded on either
    side. Raises BadRequestError."""
    ids_BT = _matrix(inputs, IDS)
    if len(ids_BT) > max_sequences:
        raise BadRequestError(f"{IDS} has {len(ids_BT)} rows, a request has at most {max_sequences}")
    if MASK not in inputs:
        return Sequences(_as_int32(ids_BT.ravel()), np.ones(ids_BT.shape, bool))
    given_BT = _matrix(inputs, MASK)
    if given_BT.shape != ids_BT.shape:
        raise BadRequestError(f"{MASK} has shape {list(given_BT.shape)}, {IDS} has {list(ids_BT.shape)}")
    mask_BT = given_BT == 1
    if not (mask_BT | (given_BT == 0)).all():
        raise BadRequestError(f"{MASK} holds something other than 0 and 1")
    runs_B = mask_BT[:, 0] + (mask_BT[:, 1:] & ~mask_BT[:, :-1]).sum(axis=1)
    if not (runs_B == 1).all():
        raise BadRequestError(
            f"{MASK}, row {int(np.argmax(runs_B != 1))}: its 1s must be one run (padding stands left or right of a sequence)"
        )
    return Sequences(_as_int32(ids_BT[mask_BT]), mask_BT)


def texts(inputs: Mapping[str, Tensor], max_sequences: int) -> list[str]:
    """The strings of `text`, BYTES [B] or [B, 1]. Raises BadRequestError."""
    tensor = inputs[TEXT]
    if tensor.datatype != "BYTES" or tensor.array.ndim not in (1, 2) or tensor.shape[1:] not in ((), (1,)):
        raise BadRequestError(f"{TEXT} is BYTES [b] or [b, 1], not {tensor.datatype} {list(tensor.shape)}")
    if not 0 < tensor.array.size <= max_sequences:
        raise BadRequestError(f"{TEXT} has {tensor.array.size} rows, a request has 1 to {max_sequences}")
    try:
        return [element.decode() for element in tensor.array.ravel()]
    except UnicodeDecodeError:
        raise BadRequestError(f"{TEXT} is not UTF-8") from None


def _matrix(inputs: Mapping[str, Tensor], name: str) -> Array:
    tensor = inputs[name]
    if tensor.datatype not in ("INT32", "INT64") or tensor.array.ndim != 2 or not tensor.array.size:
        raise BadRequestError(
            f"{name} is INT32 or INT64 [b, T] with at least one row and column, not {tensor.datatype} {list(tensor.shape)}"
        )
    return tensor.array


def _as_int32(ids: Array) -> IntArray:
    if ids.min() < 0 or ids.max() > INT32_MAX:
        raise BadRequestError(f"token ids range from {ids.min()} to {ids.max()}: ids are non-negative and below the model's vocabulary")
    return ids.astype(np.int32)


def _filled(mask: Array, values: Array, dtype: type[np.generic]) -> Array:
    if mask.all():
        return values.reshape(*mask.shape, *values.shape[1:])
    array = np.zeros((*mask.shape, *values.shape[1:]), dtype)
    array[mask] = values
    return array
