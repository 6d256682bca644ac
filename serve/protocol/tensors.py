"""Tensors of the protocol and their encodings: raw bytes (both transports), JSON values (HTTP), typed contents (gRPC).

Every decoder takes what a stranger sent: whatever is wrong with it is a BadRequestError that names the tensor and the reason,
raised before memory is taken for more elements than there are bytes.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from app.errors import BadRequestError
from serve.protocol import open_inference_pb2 as pb

Array = np.ndarray[Any, np.dtype[Any]]

DTYPES: dict[str, np.dtype[Any]] = {
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP32": np.dtype("<f4"),
    "FP16": np.dtype("<f2"),
    "BYTES": np.dtype(object),  # elements are `bytes`
}
"""The datatypes that the service speaks."""

MAX_RANK = 8
MAX_DIMENSION = 2**31 - 1

_JSON_TYPES: dict[str, set[type]] = {"i": {int}, "f": {int, float}, "O": {str}}
"""By kind of dtype. `bool` is not among them, although it is an `int` to Python."""

_CONTENTS = {"INT32": "int_contents", "INT64": "int64_contents", "FP32": "fp32_contents", "BYTES": "bytes_contents"}
"""Where the typed values of a datatype lie. FP16 has none and travels raw."""

_LENGTH = struct.Struct("<I")


@dataclass(frozen=True)
class Tensor:
    """array: of `DTYPES[datatype]`."""

    name: str
    datatype: str
    array: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape


@dataclass(frozen=True)
class Header:
    """What a tensor says it is, checked, before its data is looked at."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    elements: int

    def refuse(self, reason: str) -> BadRequestError:
        return BadRequestError(f"tensor {self.name!r}: {reason}")


def header(name: str, datatype: str, shape: Sequence[int]) -> Header:
    """Raises BadRequestError for a datatype that is not spoken or a shape that is none."""
    if datatype not in DTYPES:
        raise BadRequestError(f"tensor {name!r}: datatype {datatype[:20]!r} is none of {', '.join(DTYPES)}")
    if len(shape) > MAX_RANK or not all(0 <= dimension <= MAX_DIMENSION for dimension in shape):
        raise BadRequestError(f"tensor {name!r}: a shape has at most {MAX_RANK} dimensions from 0 to {MAX_DIMENSION}, not {_short(shape)}")
    return Header(name, datatype, tuple(shape), math.prod(shape))


def from_raw(head: Header, data: bytes | memoryview) -> Tensor:
    """Little-endian, row by row; BYTES elements each behind their length in 4 bytes."""
    if head.datatype == "BYTES":
        return _tensor(head, _split_bytes(head, data))
    dtype = DTYPES[head.datatype]
    if len(data) != head.elements * dtype.itemsize:
        raise head.refuse(f"{head.datatype} {_short(head.shape)} takes {head.elements * dtype.itemsize} bytes, not {len(data)}")
    return _tensor(head, np.frombuffer(data, dtype))


def to_raw(tensor: Tensor) -> bytes:
    """The inverse of `from_raw`."""
    if tensor.datatype == "BYTES":
        return b"".join(_LENGTH.pack(len(element)) + element for element in tensor.array.ravel())
    return np.ascontiguousarray(tensor.array, DTYPES[tensor.datatype]).tobytes()


def from_json(head: Header, data: list[Any]) -> Tensor:
    """Values row by row, in one list or nested as the shape says. BYTES are strings, sent as UTF-8."""
    values = _flatten(head, data)
    if len(values) != head.elements:
        raise head.refuse(f"shape {_short(head.shape)} takes {head.elements} values, not {len(values)}")
    dtype = DTYPES[head.datatype]
    if not set(map(type, values)) <= _JSON_TYPES[dtype.kind]:
        wrong = next(value for value in values if type(value) not in _JSON_TYPES[dtype.kind])
        raise head.refuse(f"{str(wrong)[:40]!r} is no {head.datatype} value")
    try:
        if head.datatype == "BYTES":
            return _tensor(head, [value.encode() for value in values])
        with np.errstate(over="ignore"):
            return _tensor(head, np.array(values, dtype))
    except (OverflowError, UnicodeEncodeError) as error:
        raise head.refuse(f"a value does not fit {head.datatype} ({error})") from None


def to_json(tensor: Tensor) -> list[Any]:
    """The inverse of `from_json`, in one list. Raises BadRequestError for BYTES that are no text: these travel raw only."""
    values = tensor.array.ravel().tolist()
    if tensor.datatype != "BYTES":
        return values
    try:
        return [value.decode() for value in values]
    except UnicodeDecodeError:
        raise BadRequestError(f"tensor {tensor.name!r}: holds bytes that are no UTF-8 text; ask for binary data") from None


def from_contents(head: Header, contents: pb.InferTensorContents) -> Tensor:
    """Typed values of protobuf; the field must be the datatype's."""
    field = _CONTENTS.get(head.datatype)
    if field is None:
        raise head.refuse(f"{head.datatype} has no typed contents: send raw_input_contents")
    wrong = [descriptor.name for descriptor, _ in contents.ListFields() if descriptor.name != field]
    if wrong:
        raise head.refuse(f"{head.datatype} values belong into {field}, not {wrong[0]}")
    values = getattr(contents, field)
    if len(values) != head.elements:
        raise head.refuse(f"shape {_short(head.shape)} takes {head.elements} values, not {len(values)}")
    return _tensor(head, list(values) if head.datatype == "BYTES" else np.array(values, DTYPES[head.datatype]))


def _tensor(head: Header, values: Array | list[bytes]) -> Tensor:
    if isinstance(values, list):
        array = np.empty(len(values), object)
        array[:] = values
        values = array
    return Tensor(head.name, head.datatype, values.reshape(head.shape))


def _split_bytes(head: Header, data: bytes | memoryview) -> list[bytes]:
    elements: list[bytes] = []
    position = 0
    while position < len(data):
        if position + _LENGTH.size > len(data):
            raise head.refuse(f"its data ends within the length of element {len(elements)}")
        (length,) = _LENGTH.unpack_from(data, position)
        position += _LENGTH.size
        if position + length > len(data):
            raise head.refuse(f"element {len(elements)} says {length} bytes, {len(data) - position} are left")
        elements.append(bytes(data[position : position + length]))
        position += length
    if len(elements) != head.elements:
        raise head.refuse(f"shape {_short(head.shape)} takes {head.elements} elements, not {len(elements)}")
    return elements


def _flatten(head: Header, data: list[Any]) -> list[Any]:
    """One list from a list nested as the shape says, or from one that is flat already."""
    if not (data and isinstance(data[0], list)):
        return data
    level = [data]
    for dimension in head.shape:
        if not all(isinstance(row, list) and len(row) == dimension for row in level):
            raise head.refuse(f"its rows are ragged or not nested as shape {_short(head.shape)} says")
        level = list(itertools.chain.from_iterable(level))
    return level


def _short(shape: Sequence[int]) -> str:
    """A shape as text, without filling the log where it is none."""
    return str(list(shape[: MAX_RANK + 1]))[:200]
