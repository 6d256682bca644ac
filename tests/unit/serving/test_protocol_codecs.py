"""Whole requests and answers: JSON with bytes behind it, and protobuf; and what padded batches turn into."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.errors import BadRequestError
from app.workers.scoring_messages import ModelIdentity
from serve.protocol import grpc_codec, json_codec
from serve.protocol import open_inference_pb2 as pb
from serve.protocol.messages import InferRequest, InferResponse
from serve.protocol.sequences import from_rows, from_tensors, texts
from serve.protocol.tensors import Tensor

QUICK = settings(max_examples=30, deadline=None, database=None)
IDS = np.array([[5, 6, 7], [8, 9, 0]], np.int32)
MASK = np.array([[1, 1, 1], [1, 1, 0]], np.int64)
ENTRIES: list[dict[str, Any]] = [
    {"name": "input_ids", "datatype": "INT32", "shape": [2, 3], "data": IDS.tolist()},
    {"name": "attention_mask", "datatype": "INT64", "shape": [2, 3], "parameters": {"binary_data_size": 48}},
]
ANSWER = InferResponse(
    ModelIdentity("reward", "3", "abc"), "q1", (Tensor("rewards", "FP32", np.array([0.5, -1.0], np.float32)),), lengths=(3, 2)
)


def body(tail: bytes = MASK.tobytes(), **changes: Any) -> tuple[bytes, str]:
    text = json.dumps({"id": "q1", "inputs": ENTRIES, **changes}).encode()
    return text + tail, str(len(text))


def protobuf() -> pb.ModelInferRequest:
    message = pb.ModelInferRequest(model_name="reward", id="q1", raw_input_contents=[IDS.tobytes(), MASK.tobytes()])
    message.inputs.add(name="input_ids", datatype="INT32", shape=[2, 3])
    message.inputs.add(name="attention_mask", datatype="INT64", shape=[2, 3])
    return message


def check(request: InferRequest) -> None:
    assert (request.model, request.id) == ("reward", "q1")
    np.testing.assert_array_equal(request.inputs["input_ids"].array, IDS)
    np.testing.assert_array_equal(request.inputs["attention_mask"].array, MASK)


def test_json_with_bytes_behind_it() -> None:
    data, length = body(
        parameters={"timeout": 1_500_000, "alone": True}, outputs=[{"name": "rewards", "parameters": {"binary_data": True}}]
    )
    request = json_codec.decode_request("reward", "", data, length)
    check(request)
    assert request.timeout_seconds == 1.5 and request.alone and request.outputs[0].binary


def test_protobuf_raw_and_typed() -> None:
    message = protobuf()
    check(grpc_codec.decode_request(message))
    del message.raw_input_contents[:]
    message.inputs[0].contents.int_contents.extend(IDS.ravel().tolist())
    message.inputs[1].contents.int64_contents.extend(MASK.ravel().tolist())
    check(grpc_codec.decode_request(message))


def test_answers_name_who_answered() -> None:
    text, length = json_codec.encode_response(ANSWER)
    assert length is None
    assert json.loads(text) == {
        "id": "q1",
        "model_name": "reward",
        "model_version": "3",
        "parameters": {"weights_hash": "abc"},
        "outputs": [{"name": "rewards", "datatype": "FP32", "shape": [2], "data": [0.5, -1.0]}],
    }
    binary = InferResponse(**{**vars(ANSWER), "binary": frozenset(["rewards"])})
    data, length = json_codec.encode_response(binary)
    assert length is not None
    assert json.loads(data[:length])["outputs"][0]["parameters"] == {"binary_data_size": 8}
    assert np.frombuffer(data[length:], np.float32).tolist() == [0.5, -1.0]
    message = grpc_codec.encode_response(ANSWER)
    assert (message.model_name, message.model_version, message.id) == ("reward", "3", "q1")
    assert message.parameters["weights_hash"].string_param == "abc"
    assert np.frombuffer(message.raw_output_contents[0], np.float32).tolist() == [0.5, -1.0]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: (b"{", None), "JSON"),
        (lambda: (b"[" * 100_000, None), "JSON"),
        (lambda: (b"\xff\xfe", None), "JSON"),
        (lambda: (b'{"inputs": []}', None), "no inputs"),
        (lambda: (b'{"inputs": {}}', None), "inputs: Input should be a valid"),
        (lambda: (b'{"inputs": [{"name": "x", "datatype": "INT32", "shape": ["2"]}]}', None), r"inputs\.0\.shape\.0"),
        (lambda: body(inputs=[ENTRIES[0], ENTRIES[0]], tail=b""), "same name"),
        (lambda: body(inputs=[{**ENTRIES[0], "data": None}], tail=b""), "either"),
        (lambda: body(tail=MASK.tobytes()[:-1]), "48, but 47 bytes are left"),
        (lambda: body(tail=MASK.tobytes() + b"x"), "1 bytes behind the JSON"),
        (lambda: (body()[0], "999999"), "but the body has"),
        (lambda: (body()[0], "-1"), "number of bytes"),
        (lambda: (body()[0], "٣"), "number of bytes"),
        (lambda: (body()[0], "10"), "JSON"),
        (lambda: body(inputs=[{**ENTRIES[1], "parameters": {"binary_data_size": -8}}]), "binary_data_size"),
        (lambda: body(inputs=[{**ENTRIES[1], "parameters": {"shared_memory_region": "r"}}]), "not supported"),
        (lambda: body(outputs=[{"name": "rewards", "parameters": {"classification": 3}}]), "not supported"),
        (lambda: body(parameters={"timeout": "soon"}), "microseconds"),
        (lambda: body(parameters={"binary_data_output": 1}), "true or false"),
    ],
)
def test_malformed_bodies_have_their_reason(make: Callable[[], tuple[bytes, str | None]], reason: str) -> None:
    data, length = make()
    with pytest.raises(BadRequestError, match=reason):
        json_codec.decode_request("reward", "", data, length)


@QUICK
@given(st.binary(max_size=60) | st.just(body()[0]), st.text("0123-.x٣ ", max_size=4) | st.none())
def test_any_body_is_read_or_refused(data: bytes, length: str | None) -> None:
    with suppress(BadRequestError):
        json_codec.decode_request("reward", "", data, length)


@QUICK
@given(st.integers(0, len(body()[0]) - 1), st.binary(min_size=1, max_size=3))
def test_a_damaged_body_is_read_or_refused(position: int, damage: bytes) -> None:
    data, length = body()
    with suppress(BadRequestError):
        json_codec.decode_request("reward", "", data[:position] + damage + data[position + len(damage) :], length)


@QUICK
@given(st.integers(0, protobuf().ByteSize() - 1), st.binary(min_size=1, max_size=3))
def test_a_damaged_message_is_read_or_refused(position: int, damage: bytes) -> None:
    data = protobuf().SerializeToString()
    try:
        message = pb.ModelInferRequest.FromString(data[:position] + damage + data[position + len(damage) :])
    except Exception:  # noqa: BLE001 - protobuf's own refusal, a type of its C++ part
        return
    with suppress(BadRequestError):
        grpc_codec.decode_request(message)


def test_malformed_messages_have_their_reason() -> None:
    message = protobuf()
    del message.raw_input_contents[1]
    with pytest.raises(BadRequestError, match="2 inputs need as many raw_input_contents, not 1"):
        grpc_codec.decode_request(message)
    message = protobuf()
    message.inputs[0].contents.int_contents.append(1)
    with pytest.raises(BadRequestError, match="both raw and typed"):
        grpc_codec.decode_request(message)


def tensors(ids: Any, mask: Any = None, dtype: type = np.int32) -> dict[str, Tensor]:
    names = {"input_ids": ids} if mask is None else {"input_ids": ids, "attention_mask": mask}
    datatype = {np.int32: "INT32", np.int64: "INT64", np.float32: "FP32"}[dtype]
    return {name: Tensor(name, datatype, np.array(array, dtype)) for name, array in names.items()}


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_padding_on_either_side(dtype: type) -> None:
    sequences = from_tensors(tensors([[0, 0, 1, 2], [3, 4, 5, 0], [6, 7, 8, 9]], [[0, 0, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]], dtype), 8)
    assert sequences.ids_N.dtype == np.int32
    assert sequences.ids_N.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert sequences.lengths_B.tolist() == [2, 3, 4]
    logprobs = sequences.spread("logprobs", np.array([1, 2, 3, 4, 5, 6], np.float32))
    assert logprobs.array.tolist() == [[0, 0, 1], [2, 3, 0], [4, 5, 6]]
    logits = sequences.spread("logits", np.arange(1, 10, dtype=np.float16)[:, None])
    assert logits.array[..., 0].tolist() == [[0, 0, 1, 2], [3, 4, 5, 0], [6, 7, 8, 9]]
    assert sequences.spread("rewards", np.array([1, 2, 3], np.float32)).shape == (3,)


def test_no_mask_is_no_padding() -> None:
    assert from_tensors(tensors([[1, 2], [3, 4]]), 8).lengths_B.tolist() == [2, 2]
    rows = from_rows([[1, 2, 3], [4]])
    assert rows.ids_N.tolist() == [1, 2, 3, 4]
    assert rows.mask_BT.tolist() == [[True] * 3, [True, False, False]]


def test_one_token_has_no_logprob() -> None:
    assert from_tensors(tensors([[1], [2]]), 8).spread("logprobs", np.empty(0, np.float32)).shape == (2, 0)


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        (tensors([1, 2]), r"\[b, T\]"),
        (tensors([[0.5]], dtype=np.float32), "INT32 or INT64"),
        (tensors(np.empty((0, 3))), "at least one"),
        (tensors(np.empty((3, 0))), "at least one"),
        (tensors([[1]] * 9), "9 rows, a request has at most 8"),
        (tensors([[1, 2]], [[1]]), "shape"),
        (tensors([[1, 2]], [[1, 2]]), "0 and 1"),
        (tensors([[1, 2], [1, 2]], [[1, 1], [0, 0]]), "row 1"),
        (tensors([[1, 2, 3]], [[1, 0, 1]]), "one run"),
        (tensors([[1, -1]]), "-1"),
        (tensors([[1, 2**40]], dtype=np.int64), "vocabulary"),
    ],
)
def test_refused_batches(inputs: dict[str, Tensor], reason: str) -> None:
    with pytest.raises(BadRequestError, match=reason):
        from_tensors(inputs, 8)


def test_texts() -> None:
    def given_texts(*rows: bytes, shape: tuple[int, ...] = (-1,)) -> dict[str, Tensor]:
        return {"text": Tensor("text", "BYTES", np.array(rows, object).reshape(shape))}

    assert texts(given_texts(b"a", "ü".encode()), 8) == ["a", "ü"]
    assert texts(given_texts(b"a", b"b", shape=(2, 1)), 8) == ["a", "b"]
    for wrong, reason in (
        (given_texts(b"a", b"b", shape=(1, 2)), "BYTES"),
        (given_texts(), "rows"),
        (given_texts(*[b""] * 9), "9 rows"),
        (given_texts(b"\xff"), "UTF-8"),
    ):
        with pytest.raises(BadRequestError, match=reason):
            texts(wrong, 8)
    with pytest.raises(BadRequestError, match="without a token"):
        from_rows([[1], []])
