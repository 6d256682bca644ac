"""Tensors survive every encoding, and whatever a stranger sends is read or refused with a reason."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.errors import BadRequestError
from serve.protocol import open_inference_pb2 as pb
from serve.protocol.tensors import DTYPES, Tensor, from_contents, from_json, from_raw, header, to_json, to_raw

QUICK = settings(max_examples=25, deadline=None, database=None)
CONTENTS = {"INT32": "int_contents", "INT64": "int64_contents", "FP32": "fp32_contents", "BYTES": "bytes_contents"}


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    datatype = draw(st.sampled_from(sorted(DTYPES)))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    count = int(np.prod(shape, dtype=int))
    values: st.SearchStrategy[Any] = {
        "INT32": st.integers(-(2**31), 2**31 - 1),
        "INT64": st.integers(-(2**63), 2**63 - 1),
        "FP32": st.floats(width=32, allow_nan=False),
        "FP16": st.floats(width=16, allow_nan=False),
        "BYTES": st.text("aü0\0", max_size=5).map(str.encode),
    }[datatype]
    array = np.empty(count, DTYPES[datatype])
    array[:] = draw(st.lists(values, min_size=count, max_size=count))
    return Tensor("x", datatype, array.reshape(shape))


def same(one: Tensor, other: Tensor) -> bool:
    return one.datatype == other.datatype and one.shape == other.shape and one.array.tolist() == other.array.tolist()


@QUICK
@given(tensors())
def test_every_encoding_is_undone(tensor: Tensor) -> None:
    head = header(tensor.name, tensor.datatype, tensor.shape)
    assert same(from_raw(head, to_raw(tensor)), tensor)
    assert same(from_json(head, json.loads(json.dumps(to_json(tensor)))), tensor)
    if tensor.array.size and tensor.array.ndim:
        nested = tensor.array.tolist() if tensor.datatype != "BYTES" else np.vectorize(bytes.decode, otypes=[object])(tensor.array).tolist()
        assert same(from_json(head, nested), tensor)
    if tensor.datatype in CONTENTS:
        contents = pb.InferTensorContents(**{CONTENTS[tensor.datatype]: tensor.array.ravel().tolist()})
        assert same(from_contents(head, contents), tensor)


@QUICK
@given(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(-1, 2**70), max_size=10), st.binary(max_size=40))
def test_any_bytes_are_read_or_refused(datatype: str, shape: list[int], data: bytes) -> None:
    with suppress(BadRequestError):
        tensor = from_raw(header("x", datatype, shape), data)
        assert list(tensor.shape) == shape and to_raw(tensor) == data


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text("a0\ud800", max_size=3),
    lambda inner: st.lists(inner, max_size=3),
)


@QUICK
@given(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 3), max_size=3), st.lists(JSON, max_size=4))
def test_any_json_is_read_or_refused(datatype: str, shape: list[int], data: list[Any]) -> None:
    with suppress(BadRequestError):
        assert list(from_json(header("x", datatype, shape), data).shape) == shape


@pytest.mark.parametrize(
    ("datatype", "shape", "data", "reason"),
    [
        ("INT32", [2, 2], [[1, 2], [3]], "ragged"),
        ("INT32", [2, 2], [[1, 2], 3], "ragged"),
        ("INT32", [2], [[1], [2]], "no INT32"),
        ("INT32", [3], [1, 2], "takes 3 values, not 2"),
        ("INT32", [1], [True], "'True' is no INT32"),
        ("INT32", [1], [1.0], "'1.0' is no INT32"),
        ("INT32", [1], [2**31], "does not fit"),
        ("INT64", [1], [10**30], "does not fit"),
        ("BYTES", [1], [1], "is no BYTES"),
        ("BYTES", [1], ["\ud800"], "does not fit"),
        ("FP32", [1], ["1"], "is no FP32"),
        ("BF16", [1], [1], "none of INT32"),
        ("INT32", [-1], [], "dimensions from 0"),
        ("INT32", [1] * 9, [1], "at most 8"),
        ("INT32", [2**31, 2**31], [1], "dimensions from 0"),
    ],
)
def test_malformed_json_has_its_reason(datatype: str, shape: list[int], data: list[Any], reason: str) -> None:
    with pytest.raises(BadRequestError, match=reason):
        from_json(header("x", datatype, shape), data)


@pytest.mark.parametrize(
    ("datatype", "shape", "data", "reason"),
    [
        ("INT32", [2], b"1234", "takes 8 bytes, not 4"),
        ("INT32", [2**31 - 1, 2**31 - 1], b"", "takes"),
        ("BYTES", [1], b"\x05\x00\x00\x00abc", "says 5 bytes, 3 are left"),
        ("BYTES", [1], b"\x05\x00", "ends within the length of element 0"),
        ("BYTES", [2], b"\x01\x00\x00\x00a", "takes .* elements, not 1"),
        ("BYTES", [2**31 - 1], b"", "elements, not 0"),
    ],
)
def test_malformed_bytes_have_their_reason(datatype: str, shape: list[int], data: bytes, reason: str) -> None:
    with pytest.raises(BadRequestError, match=reason):
        from_raw(header("x", datatype, shape), data)


@pytest.mark.parametrize(
    ("datatype", "contents", "reason"),
    [
        ("INT32", {"int64_contents": [1]}, "belong into int_contents"),
        ("INT32", {"int_contents": [1], "fp32_contents": [1.0]}, "belong into int_contents"),
        ("INT32", {}, "takes 1 values, not 0|1.* values, not 0"),
        ("FP16", {"fp32_contents": [1.0]}, "raw_input_contents"),
    ],
)
def test_malformed_contents_have_their_reason(datatype: str, contents: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRequestError, match=reason):
        from_contents(header("x", datatype, [1]), pb.InferTensorContents(**contents))


def test_bytes_that_are_no_text_do_not_travel_as_json() -> None:
    with pytest.raises(BadRequestError, match="UTF-8"):
        to_json(from_raw(header("x", "BYTES", [1]), b"\x01\x00\x00\x00\xff"))
