"""Requests of callers that mean no good, and what each is refused with."""

from __future__ import annotations

from typing import Any

import grpc
import numpy as np

from serve.protocol import open_inference_pb2 as pb
from tests.tiny_models import CONTEXT, VOCABULARY

MIB = 2**20
"""The longest request of the service under attack."""


def infer_message(
    ids: Any = ((5, 6, 7),), model: str = "reward", datatype: str = "INT32", shape: Any = None, raw: bytes | None = None
) -> bytes:
    array = np.array(ids, np.int32)
    message = pb.ModelInferRequest(model_name=model, raw_input_contents=[array.tobytes() if raw is None else raw])
    message.inputs.add(name="input_ids", datatype=datatype, shape=array.shape if shape is None else shape)
    return message.SerializeToString()


def tensor(ids: Any, **changes: Any) -> dict[str, Any]:
    return {"name": "input_ids", "datatype": "INT32", "shape": list(np.shape(ids)), "data": ids, **changes}


INVALID, TOO_LONG = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OUT_OF_RANGE
GRPC_ATTACKS = [
    (b"\xff\xff\xff", INVALID),
    (infer_message(model="nobody"), grpc.StatusCode.NOT_FOUND),
    (infer_message(datatype="FP32"), INVALID),
    (infer_message(datatype="FP64"), INVALID),
    (infer_message(shape=(3,)), INVALID),
    (infer_message(shape=(1, 4)), INVALID),
    (infer_message(shape=(-1, -3)), INVALID),
    (infer_message(shape=(2**40, 2**40)), INVALID),
    (infer_message(shape=(2**31 - 1, 2**31 - 1)), INVALID),
    (infer_message(raw=b"\x01\x02"), INVALID),
    (infer_message([[-5]]), INVALID),
    (infer_message([[VOCABULARY]]), INVALID),
    (infer_message([[2**31 - 1]]), INVALID),
    (infer_message([[5] * (CONTEXT + 1)]), TOO_LONG),
    (infer_message([[5]] * 1025), INVALID),
    (infer_message(raw=bytes(2 * MIB)), grpc.StatusCode.RESOURCE_EXHAUSTED),
]


HTTP_ATTACKS: list[tuple[bytes | dict[str, Any], dict[str, str], int]] = [
    (b"{", {}, 400),
    (b"", {}, 400),
    (b"[" * 10**6, {}, 400),
    (b'{"inputs":' + b"[" * 10**5, {}, 400),
    (b'{"inputs": [' + b"{}," * 10**5 + b"{}]}", {}, 400),
    ({"inputs": [tensor([[5]], datatype="FP64")]}, {}, 400),
    ({"inputs": [tensor([[5.5]])]}, {}, 400),
    ({"inputs": [tensor([["5"]])]}, {}, 400),
    ({"inputs": [tensor([[5, 6]], shape=[2, 2])]}, {}, 400),
    ({"inputs": [tensor([[5, 6]], shape=[2**40, 2**40])]}, {}, 400),
    ({"inputs": [tensor([[5, 6]], shape=[-1, 2])]}, {}, 400),
    ({"inputs": [tensor([[[5, 6]]])]}, {}, 400),
    ({"inputs": [{**tensor([[5]]), "data": [[5, 6], [7]], "shape": [2, 2]}]}, {}, 400),
    ({"inputs": [tensor([[-5]])]}, {}, 400),
    ({"inputs": [tensor([[VOCABULARY]])]}, {}, 400),
    ({"inputs": [tensor([[10**30]])]}, {}, 400),
    ({"inputs": [tensor([[5]] * 1025)]}, {}, 400),
    ({"inputs": [tensor([[5] * (CONTEXT + 1)])]}, {}, 413),
    ({"inputs": [tensor([[5]]), tensor([[0]], name="attention_mask")]}, {}, 400),
    ({"inputs": [tensor([[5]]), tensor([[1]], name="else")]}, {}, 400),
    ({"inputs": [tensor([[5]], parameters={"binary_data_size": 4})]}, {}, 400),
    ({"inputs": [tensor([[5]])]}, {"Inference-Header-Content-Length": "10"}, 400),
    ({"inputs": [tensor([[5]])]}, {"Inference-Header-Content-Length": "100000"}, 400),
    ({"inputs": [tensor([[5]])]}, {"Inference-Header-Content-Length": "-1"}, 400),
    ({"inputs": [tensor([[5]])]}, {"Inference-Header-Content-Length": "1" * 1000}, 400),
    ({"inputs": [tensor([[5]])]}, {"Content-Encoding": "gzip"}, 400),
    ({"inputs": [tensor([[5]])]}, {"Content-Encoding": "zstd"}, 400),
    (b"x" * (MIB + 1), {}, 413),
]
