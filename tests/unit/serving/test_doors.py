"""Both doors over stand-ins for the models: what goes in, what comes out, and what every failure is called outside."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from fastapi.testclient import TestClient
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError

from app.config.serving import ServingConfig
from app.errors import NotReadyError, OverloadedError, ScoringError, ScoringTimeoutError
from serve import access_log
from serve.byte_budget import ByteBudget
from serve.credentials import Credentials
from serve.gateway import Gateway
from serve.grpc_door import SERVICE, GrpcDoor
from serve.http_door import http_app
from serve.protocol import open_inference_pb2 as pb
from serve.protocol.json_codec import HEADER_LENGTH
from tests.tiny_models import make_tokenizer
from tests.unit.serving.fake_models import VOCABULARY, FakeModel, fake_models

CONFIG = ServingConfig(max_request_bytes=4096, max_request_sequences=8, max_logits_bytes=2 * VOCABULARY * 12)
TOKEN = "s3cret"
IDS = [[3, 4, 5, 0], [6, 7, 0, 0]]
MASK = [[1, 1, 1, 0], [1, 1, 0, 0]]


@pytest.fixture
def models() -> dict[str, FakeModel]:
    return fake_models()


@pytest.fixture
def client(models: dict[str, FakeModel]) -> TestClient:
    return http_client(models)


@pytest.fixture(scope="module")
def steady() -> TestClient:
    """For requests that leave everything as it is: building the application takes most of a test's time."""
    return http_client(fake_models())


def http_client(models: dict[str, FakeModel], token: str | None = None, budget: int = 2**20) -> TestClient:
    app = http_app(Gateway(models, CONFIG), CONFIG, Credentials.of(token), ByteBudget(budget))
    return TestClient(app, raise_server_exceptions=False)


def ask(client: TestClient, model: str = "reward", ids: Any = IDS, mask: Any = MASK, **body: Any) -> Any:
    shape = list(np.shape(ids))
    inputs = [{"name": "input_ids", "datatype": "INT32", "shape": shape, "data": ids}]
    if mask is not None:
        inputs.append({"name": "attention_mask", "datatype": "INT64", "shape": shape, "data": mask})
    return client.post(f"/v2/models/{model}/infer", json={"inputs": inputs, **body})


def test_rewards_and_logprobs(client: TestClient, models: dict[str, FakeModel]) -> None:
    answer = ask(client, id="q")
    assert answer.status_code == 200
    assert answer.json() == {
        "id": "q",
        "model_name": "reward",
        "model_version": "1",
        "parameters": {"weights_hash": "reward-hash"},
        "outputs": [{"name": "rewards", "datatype": "FP32", "shape": [2], "data": [12.0, 13.0]}],
    }
    assert (answer.headers["corral-model-version"], answer.headers["corral-weights-hash"]) == ("1", "reward-hash")
    assert models["reward"].asked[0].ids.tolist() == [3, 4, 5, 6, 7]
    (output,) = ask(client, "reference").json()["outputs"]
    assert output == {"name": "logprobs", "datatype": "FP32", "shape": [2, 3], "data": [-4, -5, 0, -7, 0, 0]}
    assert ask(client, "reference", outputs=[{"name": "logits"}, {"name": "logprobs"}]).json()["outputs"][1]["shape"] == [2, 4, VOCABULARY]
    ask(client, parameters={"alone": True})
    assert models["reward"].asked[-1].alone


def test_binary_outputs(client: TestClient) -> None:
    answer = ask(client, "reference", outputs=[{"name": "logits", "parameters": {"binary_data": True}}])
    end = int(answer.headers["inference-header-content-length"])
    (output,) = json.loads(answer.content[:end])["outputs"]
    logits = np.frombuffer(answer.content[end:], np.float16).reshape(output["shape"])
    np.testing.assert_array_equal(logits[..., 0], IDS)
    assert int(ask(client, parameters={"binary_data_output": True}).headers["inference-header-content-length"])


def test_health_metadata_and_versions(client: TestClient, models: dict[str, FakeModel]) -> None:
    for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/reward/ready", "/v2/models/reward/versions/1/ready"):
        assert client.get(path).status_code == 200
    assert "binary_tensor_data" in client.get("/v2").json()["extensions"]
    assert client.get("/v2/models/reference").json()["outputs"] == [
        {"name": "logprobs", "datatype": "FP32", "shape": [-1, -1]},
        {"name": "logits", "datatype": "FP16", "shape": [-1, -1, VOCABULARY]},
    ]
    config = client.get("/v2/models/reward/versions/1/config").json()
    assert (config["max_batch_size"], config["parameters"]["weights_hash"]["string_value"]) == (8, "reward-hash")
    assert client.get("/v2/models/reward/versions/2").status_code == 404
    assert client.post("/v2/models/reward/versions/2/infer", json={"inputs": []}).status_code == 400
    models["reward"].failures = [NotReadyError("loading")] * 3
    assert [client.get(path).status_code for path in ("/v2/health/ready", "/v2/models/reward/ready")] == [503, 503]
    index = client.post("/v2/repository/index").json()
    assert [(entry["name"], entry["state"]) for entry in index] == [("reference", "READY"), ("reward", "UNAVAILABLE")]


def test_score(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt_neox"}')
    client = http_client(fake_models(str(tmp_path)))
    assert client.post("/score", json={"model": "reward", "ids": [[1, 2], [3]]}).json() == {
        "model": "reward",
        "version": "1",
        "weights_hash": "reward-hash",
        "tokens": [2, 1],
        "rewards": [3.0, 3.0],
        "logprobs": None,
    }
    assert client.post("/score", json={"model": "reference", "ids": [[1, 2, 3], [4]]}).json()["logprobs"] == [[-2.0, -3.0], []]
    turns = [{"role": "user", "content": "!"}, {"role": "assistant", "content": '"'}]
    # <|prompter|> ! <|endoftext|> <|assistant|> " <|endoftext|>: special tokens are ids 0 to 3, and bytes from `!` on those from 4
    assert client.post("/score", json={"model": "reward", "messages": [turns]}).json()["rewards"] == [2 + 4 + 1 + 3 + 5 + 1]
    text = {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [2], "data": ['!"', "#<|assistant|>"]}]}
    assert client.post("/v2/models/reward/infer", json=text).json()["outputs"][0]["data"] == [9.0, 9.0]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"model": "reward"}, "messages: Field required"),
        ({"model": "reward", "ids": [[1]], "messages": [[]]}, "messages: Extra inputs"),
        ({"model": "reward", "ids": [[]]}, "at least 1"),
        ({"model": "reward", "ids": [[-1]]}, "greater than or equal to 0"),
        ({"model": "reward", "ids": [[1.5]]}, "valid integer"),
        ({"model": "reward", "messages": [[{"role": "tool", "content": ""}]]}, "'system', 'user' or 'assistant'"),
        ({"model": "reward", "ids": [[1]], "temperature": 1}, "Extra inputs"),
    ],
)
def test_scores_of_malformed_bodies(steady: TestClient, body: dict[str, Any], reason: str) -> None:
    answer = steady.post("/score", json=body)
    assert answer.status_code == 422
    assert reason in answer.json()["error"]


@pytest.mark.parametrize(
    ("request_of", "status", "reason"),
    [
        (lambda client: ask(client, "nobody"), 404, "this service has reference, reward"),
        (lambda client: ask(client, ids=[[VOCABULARY]], mask=None), 400, "vocabulary"),
        (lambda client: ask(client, ids=[[1] * 17], mask=None), 413, "context"),
        (lambda client: ask(client, ids=[[1]] * 9, mask=None), 400, "at most 8"),
        (lambda client: client.post("/score", json={"model": "reward", "ids": [[1]] * 9}), 400, "at most 8"),
        (lambda client: ask(client, outputs=[{"name": "logits"}]), 400, "no output 'logits'; it has rewards"),
        (lambda client: ask(client, "reference", [[1] * 13], None, outputs=[{"name": "logits"}]), 413, "max_logits_bytes"),
        (lambda client: client.post("/v2/models/reward/infer", content=b"{"), 400, "JSON"),
        (lambda client: client.post("/v2/models/reward/infer", content=b"x" * 5000), 413, "4096 bytes"),
        (lambda client: client.post("/v2/models/reward/infer", content=iter([b"x" * 5000])), 413, "4096 bytes"),
        (lambda client: client.post("/score", content=b"x" * 5000), 413, "4096 bytes"),
        (lambda client: client.post("/v2/models/reward/infer", content=b"{}", headers={HEADER_LENGTH: "9"}), 400, "9, but"),
        (lambda client: compressed(client, gzip.compress(b" " * 10**6), "gzip"), 413, "4096 bytes"),
        (lambda client: compressed(client, zlib.compress(b" " * 10**6), "deflate"), 413, "4096 bytes"),
        (lambda client: compressed(client, gzip.compress(b"{}")[:-3], "gzip"), 400, "cut off"),
        (lambda client: compressed(client, gzip.compress(b"{}") + b"x", "gzip"), 400, "follows"),
        (lambda client: compressed(client, b"{}", "gzip"), 400, "not gzip"),
        (lambda client: compressed(client, b"{}", "br"), 400, "not understood"),
        (lambda client: client.get("/v2/models/reward/infer"), 405, "Not Allowed"),
        (lambda client: client.get("/v3"), 404, "Not Found"),
        (lambda client: client.post("/score", content=b"\xff", headers={"Content-Type": "application/json"}), 400, "parsing"),
    ],
)  # fmt: skip
def test_refused_requests(steady: TestClient, request_of: Callable[[TestClient], Any], status: int, reason: str) -> None:
    answer = request_of(steady)
    assert answer.status_code == status
    assert reason in answer.json()["error"]
    assert ask(steady).status_code == 200


def compressed(client: TestClient, data: bytes, encoding: str) -> Any:
    return client.post("/v2/models/reward/infer", content=data, headers={"Content-Encoding": encoding})


def test_what_is_held_at_a_time(models: dict[str, FakeModel]) -> None:
    client = http_client(models, budget=1000)
    for answer in (client.post("/score", content=b"x" * 1001), compressed(client, gzip.compress(b" " * 1001), "gzip")):
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
    for _ in range(10):  # what was held is let go, answered or refused
        assert ask(client).status_code == 200
    with pytest.raises(grpc.RpcError) as refused:
        grpc_call(models, "ModelInfer", infer_request().SerializeToString(), budget=100)
    assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_compressed_requests(steady: TestClient) -> None:
    body = json.dumps({"inputs": [{"name": "input_ids", "datatype": "INT32", "shape": [1, 2], "data": [1, 2]}]}).encode()
    assert compressed(steady, gzip.compress(body), "gzip").json()["outputs"][0]["data"] == [3.0]
    assert compressed(steady, zlib.compress(body), "deflate").json()["outputs"][0]["data"] == [3.0]


FAILURES = [
    (OverloadedError("full", 2.6), 429, "RESOURCE_EXHAUSTED", "3"),
    (BackPressureError(1, 1), 429, "RESOURCE_EXHAUSTED", "1"),
    (NotReadyError("draining"), 503, "UNAVAILABLE", "1"),
    (ScoringTimeoutError("late"), 504, "DEADLINE_EXCEEDED", None),
    (ScoringError("NaN"), 500, "INTERNAL", None),
    (RayTaskError("infer", "trace", ScoringTimeoutError("late")).as_instanceof_cause(), 504, "DEADLINE_EXCEEDED", None),
    (ZeroDivisionError("a fault"), 500, "INTERNAL", None),
]


@pytest.mark.parametrize(("error", "status", "code", "retry"), FAILURES)
def test_failures_of_a_model(error: Exception, status: int, code: str, retry: str | None) -> None:
    models = fake_models()
    client = http_client(models)
    assert client.get("/v2/models/reward").status_code == 200
    models["reward"].failures = [error]
    answer = ask(client)
    assert (answer.status_code, answer.headers.get("retry-after")) == (status, retry)
    assert "trace" not in answer.json()["error"]
    models["reward"].failures = [error]
    refused = grpc_refusal(models, infer_request())
    assert refused.code().name == code
    assert dict(refused.trailing_metadata() or ()).get("retry-after") == retry


def test_a_request_outlives_its_replica(client: TestClient, models: dict[str, FakeModel]) -> None:
    ask(client)
    models["reward"].failures = [ActorDiedError(), ActorDiedError()]
    assert ask(client).json()["outputs"][0]["data"] == [12.0, 13.0]
    assert len(models["reward"].asked) == 4


def test_a_deadline_cancels_the_call(client: TestClient, models: dict[str, FakeModel]) -> None:
    ask(client)
    models["reward"].delay = 1.0
    answer = ask(client, parameters={"timeout": 20_000})
    assert answer.status_code == 504 and "0.02 s" in answer.json()["error"]
    assert models["reward"].infer.last.cancelled
    models["reference"].delay = 0.12
    late = ask(client, "reference", outputs=[{"name": "logits"}, {"name": "logprobs"}], parameters={"timeout": 200_000})
    assert "no answer within 0.2 s" in late.json()["error"], "the seconds asked for, not what the first output left of them"


def test_an_answer_is_of_one_version(client: TestClient, models: dict[str, FakeModel]) -> None:
    assert ask(client).json()["model_version"] == "1"
    models["reward"].swap("2 ü")
    answer = ask(client)
    assert (answer.json()["model_version"], answer.headers["corral-model-version"]) == ("2 ü", "2%20%C3%BC")
    models["reward"].swap("2")
    body = {"inputs": [{"name": "input_ids", "datatype": "INT32", "shape": [1, 1], "data": [1]}]}
    assert client.post("/v2/models/reward/versions/1/infer", json=body).status_code == 404
    assert client.post("/v2/models/reward/versions/2/infer", json=body).json()["model_version"] == "2"


def test_the_token(models: dict[str, FakeModel], capsys: pytest.CaptureFixture[str]) -> None:
    client = http_client(models, TOKEN)
    assert [client.get(path).status_code for path in ("/v2/health/live", "/v2/health/ready", "/openapi.json")] == [200, 200, 401]
    for header in (None, "Bearer", "Bearer wrong", "Basic " + TOKEN, "Bearer ü"):
        answer = client.get("/v2", headers={} if header is None else {"Authorization": header.encode()})
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    client.headers["Authorization"] = f"Bearer {TOKEN}"
    assert ask(client).status_code == 200
    assert grpc_refusal(models, infer_request(), TOKEN).code() == grpc.StatusCode.UNAUTHENTICATED
    assert grpc_call(models, "ServerReady", b"", TOKEN) == pb.ServerReadyResponse(ready=True).SerializeToString()
    message = infer_request().SerializeToString()
    assert grpc_call(models, "ModelInfer", message, TOKEN, [("authorization", f"Bearer {TOKEN}")])


@pytest.fixture
def lines(tmp_path: Path) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    file = tmp_path / "logs" / "access.jsonl"
    access_log.open_log(str(file))
    yield lambda: [json.loads(line) for line in file.read_text().splitlines()]
    access_log.open_log(None)


def test_the_access_log(client: TestClient, models: dict[str, FakeModel], lines: Callable[[], list[dict[str, Any]]]) -> None:
    client.headers["x-request-id"] = 'a"b'
    ask(client)
    ask(client, "nobody")
    grpc_call(models, "ModelInfer", infer_request().SerializeToString(), metadata=[("x-request-id", "g")])
    good, bad, remote = lines()
    assert good["ms"] > 0
    kept = ("request_id", "protocol", "method", "model", "version", "sequences", "tokens", "status")
    assert [good[key] for key in kept] == ['a"b', "http", "POST /v2/models/reward/infer", "reward", "1", 2, 5, "200"]
    assert (bad["status"], bad["model"], bad["request_id"]) == ("404", "nobody", 'a"b') and "no model" in bad["reason"]
    assert [remote[key] for key in kept] == ["g", "grpc", "ModelInfer", "reward", "1", 2, 5, "OK"]
    assert models["reward"].asked[0].request_id == 'a"b'


def infer_request(model: str = "reward", **fields: Any) -> pb.ModelInferRequest:
    raw = [np.array(IDS, np.int32).tobytes(), np.array(MASK, np.int32).tobytes()]
    message = pb.ModelInferRequest(model_name=model, raw_input_contents=raw, **fields)
    for name in ("input_ids", "attention_mask"):
        message.inputs.add(name=name, datatype="INT32", shape=[2, 4])
    return message


def grpc_call(
    models: dict[str, FakeModel], method: str, data: bytes, token: str | None = None, metadata: Any = (), budget: int = 2**20
) -> bytes:
    """One call to a door of its own; raises grpc.RpcError."""

    async def scenario() -> bytes:
        door = GrpcDoor(Gateway(models, CONFIG), Credentials.of(token), ByteBudget(budget), max_bytes=CONFIG.max_request_bytes)
        port = await door.start("127.0.0.1", 0)
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                reply: bytes = await channel.unary_unary(f"/{SERVICE.full_name}/{method}")(data, metadata=metadata, timeout=5)
                return reply
        finally:
            await door.stop(0)

    return asyncio.run(scenario())


def grpc_refusal(models: dict[str, FakeModel], message: pb.ModelInferRequest, token: str | None = None) -> Any:
    with pytest.raises(grpc.RpcError) as refused:
        grpc_call(models, "ModelInfer", message.SerializeToString(), token)
    return refused.value


def test_grpc_answers(models: dict[str, FakeModel]) -> None:
    def call(method: str, request: Any, reply: Any) -> Any:
        return reply.FromString(grpc_call(models, method, request.SerializeToString()))

    answer = call("ModelInfer", infer_request(id="q"), pb.ModelInferResponse)
    assert (answer.model_name, answer.model_version, answer.id) == ("reward", "1", "q")
    assert np.frombuffer(answer.raw_output_contents[0], np.float32).tolist() == [12.0, 13.0]
    assert call("ServerLive", pb.ServerLiveRequest(), pb.ServerLiveResponse).live
    assert call("ModelReady", pb.ModelReadyRequest(name="reward"), pb.ModelReadyResponse).ready
    assert call("ServerMetadata", pb.ServerMetadataRequest(), pb.ServerMetadataResponse).name == "corral"
    metadata = call("ModelMetadata", pb.ModelMetadataRequest(name="reward", version="1"), pb.ModelMetadataResponse)
    assert [(tensor.name, list(tensor.shape)) for tensor in metadata.outputs] == [("rewards", [-1])]
    config = call("ModelConfig", pb.ModelConfigRequest(name="reference"), pb.ModelConfigResponse).config
    assert (config.max_batch_size, config.output[1].data_type) == (8, pb.TYPE_FP16)
    assert len(call("RepositoryIndex", pb.RepositoryIndexRequest(), pb.RepositoryIndexResponse).models) == 2


@pytest.mark.parametrize(
    ("change", "code", "reason"),
    [
        ({"model_name": "nobody"}, "NOT_FOUND", "no model"),
        ({"model_version": "7"}, "NOT_FOUND", "version 1"),
        ({"raw_input_contents": []}, "INVALID_ARGUMENT", "values, not 0"),
        ({"raw_input_contents": [b"", b""]}, "INVALID_ARGUMENT", "takes 32 bytes"),
        ({"raw_input_contents": [bytes(5000), b""]}, "RESOURCE_EXHAUSTED", "larger than max"),
    ],
)
def test_grpc_refusals(models: dict[str, FakeModel], change: dict[str, Any], code: str, reason: str) -> None:
    message = infer_request()
    for field in change:
        message.ClearField(field)
    message.MergeFrom(pb.ModelInferRequest(**change))
    refused = grpc_refusal(models, message)
    assert refused.code().name == code
    assert reason in refused.details()


def test_bytes_that_are_no_message(models: dict[str, FakeModel]) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        grpc_call(models, "ModelInfer", b"\xff\xff\xff")
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
