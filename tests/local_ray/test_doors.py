"""Both doors on a real Ray Serve: Triton's own clients, a service beside it with a token, and callers that mean no good."""

from __future__ import annotations

import gzip
import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import torch
from ray.util.state import list_actors

from app.config.serving import ServedModelConfig, ServingConfig
from app.config.shared import WorkersConfig
from app.models.forward import sequence_logprobs
from app.models.heads import load_reward_model, sequence_scores
from app.models.load import load_causal_lm, load_tokenizer
from jobs.serving_inputs import opened_doors
from serve.deploying import deploy, deployed, target
from serve.protocol import open_inference_pb2 as pb
from serve.scoring import scoring_application
from tests.local_ray.client_environments import client_python
from tests.local_ray.hostile_requests import GRPC_ATTACKS, HTTP_ATTACKS, MIB, infer_message, tensor
from tests.tiny_models import CONTEXT, VOCABULARY, make_neox, make_reward_model
from tests.waiting import wait_until

SERVICE = "/inference.GRPCInferenceService"
DEADLINE = 90.0
TOKEN = "s3cret"
OFFSET = 0.25
BATCH, LENGTH = 8, 24


@dataclass(frozen=True)
class Service:
    folders: dict[str, str]
    doors: ServingConfig
    log: Path

    @property
    def http(self) -> str:
        return f"http://127.0.0.1:{self.doors.http_port}"

    @property
    def grpc(self) -> str:
        return f"127.0.0.1:{self.doors.grpc_port}"


def models(folders: dict[str, str]) -> dict[str, ServedModelConfig]:
    return {name: ServedModelConfig(path=path, workers=WorkersConfig(cpus=0.1)) for name, path in folders.items()}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A reward model and a reference policy behind both doors, without a token."""
    root = tmp_path_factory.mktemp("doors")
    reference = make_neox(root / "reference")
    folders = {"reward": make_reward_model(root / "reward", reference, reward_offset=OFFSET), "reference": reference}
    log = root / "access.jsonl"
    settings = ServingConfig(http_port=0, grpc_port=0, max_request_bytes=MIB, max_logits_bytes=MIB, access_log=str(log))
    doors = opened_doors(settings)
    start = {"proxy_location": "HeadOnly", "http_options": {"host": doors.host, "port": doors.http_port}}
    application = scoring_application(models(folders), doors=doors)
    with deployed([target(application, "scoring", "/")], deadline_seconds=DEADLINE, stop_serve=True, start=start):
        yield Service(folders, doors, log)


@pytest.fixture(scope="module")
def guarded(service: Service) -> Iterator[Service]:
    """A second application on the same Serve: one model, with a token."""
    settings = ServingConfig(http_port=service.doors.http_port, grpc_port=0)
    doors = settings.model_copy(update={"grpc_port": opened_doors(settings.model_copy(update={"http_port": 0})).grpc_port})
    folders = {"reward": service.folders["reward"]}
    application = scoring_application(models(folders), doors=doors, token=TOKEN)
    with deployed([target(application, "guarded", "/guarded")], deadline_seconds=DEADLINE, stop_serve=False):
        yield Service(folders, doors, service.log)


@pytest.fixture(scope="module")
def questions() -> tuple[np.ndarray, np.ndarray]:
    """What Open-Assistant's PPO sends: ids and mask, INT32 [8, T], padded on the left."""
    generator = np.random.default_rng(0)
    ids = generator.integers(4, VOCABULARY, (BATCH, LENGTH)).astype(np.int32)
    mask = (np.arange(LENGTH) >= generator.integers(0, LENGTH - 2, (BATCH, 1))).astype(np.int32)
    return np.where(mask, ids, 0).astype(np.int32), mask


@torch.no_grad()
def direct_answers(folders: dict[str, str], ids_BT: np.ndarray, mask_BT: np.ndarray) -> dict[str, np.ndarray]:
    """The same by forward passes of one row each, without padding."""
    reward, reference = load_reward_model(folders["reward"]), load_causal_lm(folders["reference"])
    batch, width = ids_BT.shape
    rewards, logprobs = np.zeros(batch, np.float32), np.zeros((batch, width - 1), np.float32)
    logits = np.zeros((batch, width, VOCABULARY), np.float32)
    for row in range(batch):
        (places,) = np.nonzero(mask_BT[row])
        ids, attention = torch.tensor(ids_BT[row, places])[None].long(), torch.ones(1, len(places), dtype=torch.long)
        rewards[row] = float(sequence_scores(reward, ids, attention)) - OFFSET
        logprobs[row, places[:-1]] = sequence_logprobs(reference, ids, attention, temperature=1.0)[0].numpy()
        logits[row, places] = reference(input_ids=ids, attention_mask=attention).logits[0].numpy()
    return {"rewards": rewards, "logprobs": logprobs, "logits": logits}


@pytest.mark.parametrize("neighbour", [None, "guarded"], ids=["alone", "beside another application"])
def test_triton_clients(
    service: Service, questions: tuple[np.ndarray, np.ndarray], neighbour: str | None, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    python = client_python("tritonclient")
    if neighbour:
        request.getfixturevalue(neighbour)
    ids, mask = questions
    np.savez(tmp_path / "questions.npz", ids=ids, mask=mask)
    (tmp_path / "descriptor.bin").write_bytes(pb.DESCRIPTOR.serialized_pb)
    script = Path(__file__).with_name("triton_calls.py")
    addresses = [service.http.removeprefix("http://"), service.grpc]
    done = subprocess.run([python, script, tmp_path, *addresses], capture_output=True, text=True, timeout=DEADLINE, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    check_answers(service, np.load(tmp_path / "answers.npz"), ids, mask)


def check_answers(service: Service, answers: Any, ids: np.ndarray, mask: np.ndarray) -> None:
    direct = direct_answers(service.folders, ids, mask)
    tokenizer = load_tokenizer(service.folders["reward"])
    texts = [tokenizer(text)["input_ids"] for text in ("hello", "hi")]
    padded = np.array([row + [0] * (len(texts[0]) - len(row)) for row in texts], np.int32)
    of_texts = direct_answers(service.folders, padded, np.arange(len(texts[0])) < np.array([[len(row)] for row in texts]))
    assert len(answers.files) == 2 * (8 + 10) + 2 * (6 + 7)  # HTTP and gRPC, each at once and awaited, of both models
    for call in answers.files:
        _, model, kind = call.split("/")
        output = "logits" if "logits" in kind else {"reward": "rewards", "reference": "logprobs"}[model]
        expected = of_texts[output] if kind == "text" else direct[output]
        assert answers[call].dtype == (np.float16 if output == "logits" else np.float32), call
        np.testing.assert_allclose(answers[call], expected, atol=1e-2 if output == "logits" else 1e-5, err_msg=call)


def test_the_plain_face(service: Service) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    with httpx.Client(base_url=service.http, timeout=30) as client:
        answer = client.post("/score", json={"model": "reward", "messages": [turns, turns[:1]]}, headers={"x-request-id": "mine"})
        assert answer.headers.get_list("x-request-id") == ["mine"]
        of_messages = answer.json()
        assert len(of_messages["rewards"]) == 2
        tokenizer = load_tokenizer(service.folders["reward"])
        ids = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False))["input_ids"]
        of_ids = client.post("/score", json={"model": "reward", "ids": [ids]}).json()
        assert of_ids["rewards"][0] == pytest.approx(of_messages["rewards"][0], abs=1e-5)
        logprobs = client.post("/score", json={"model": "reference", "ids": [[5, 6, 7], [8]]}).json()["logprobs"]
        assert [len(row) for row in logprobs] == [2, 0]
        assert "/score" in client.get("/openapi.json").json()["paths"]
    line = next(entry for entry in map(json.loads, service.log.read_text().splitlines()) if entry["request_id"] == "mine")
    assert (line["method"], line["model"], line["sequences"], line["status"]) == ("POST /score", "reward", 2, "200")
    assert line["tokens"] == sum(of_messages["tokens"])


def test_the_token(guarded: Service) -> None:
    with httpx.Client(base_url=f"{guarded.http}/guarded", timeout=30) as client:
        body = {"model": "reward", "ids": [[5, 6]]}
        assert client.get("/v2/health/ready").status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            assert client.post("/score", json=body, headers=headers).status_code == 401
            assert client.get("/v2/models/reward", headers=headers).status_code == 401
        assert client.post("/score", json=body, headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200
    with grpc.insecure_channel(guarded.grpc) as channel:
        assert ask(channel, "ServerReady", b"")
        message = infer_message()
        assert refusal(channel, message) == (grpc.StatusCode.UNAUTHENTICATED, "the request needs the header")
        assert refusal(channel, message, [("authorization", "Bearer wrong")])[0] == grpc.StatusCode.UNAUTHENTICATED
        assert ask(channel, "ModelInfer", message, [("authorization", f"Bearer {TOKEN}")])


def ask(channel: grpc.Channel, method: str, data: bytes, metadata: Any = (), **options: Any) -> bytes:
    reply: bytes = channel.unary_unary(f"{SERVICE}/{method}")(data, metadata=metadata, timeout=30, **options)
    return reply


def refusal(channel: grpc.Channel, data: bytes, metadata: Any = (), **options: Any) -> tuple[grpc.StatusCode, str]:
    """Code and the first words of the reason."""
    with pytest.raises(grpc.RpcError) as refused:
        ask(channel, "ModelInfer", data, metadata, **options)
    return refused.value.code(), " ".join(refused.value.details().split()[:5])


@contextmanager
def memory_bound(name: str, limit: int) -> Iterator[None]:
    """The processes whose actor class holds `name` grow by less than `limit` bytes inside, at their peak."""

    def peaks() -> dict[int, int]:
        processes = [actor.pid for actor in list_actors(filters=[("state", "=", "ALIVE")]) if name in actor.class_name]
        lines = {pid: Path(f"/proc/{pid}/status").read_text().splitlines() for pid in processes}
        return {pid: 1024 * int(next(line for line in of if line.startswith("VmHWM")).split()[1]) for pid, of in lines.items()}

    before = peaks()
    assert before
    yield
    after = peaks()
    assert after.keys() == before.keys(), "a process died"
    grown = {pid: after[pid] - before[pid] for pid in after}
    assert max(grown.values()) < limit, grown


def test_hostile_grpc_requests(service: Service) -> None:
    with grpc.insecure_channel(service.grpc) as channel:
        for data, code in GRPC_ATTACKS:
            assert refusal(channel, data)[0] == code, data[:100]
        bomb = infer_message(raw=bytes(64 * MIB))
        with memory_bound("doors", 96 * MIB):
            for _ in range(3):
                assert refusal(channel, bomb, compression=grpc.Compression.Gzip)[0] == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert ask(channel, "ModelInfer", infer_message())
    with socket.create_connection(("127.0.0.1", service.doors.grpc_port)) as raw:
        raw.sendall(b"GET / HTTP/1.1\r\n\r\n" + bytes(1000))
    with grpc.insecure_channel(service.grpc) as channel:
        assert ask(channel, "ModelInfer", infer_message())


def test_hostile_http_requests(service: Service) -> None:
    with httpx.Client(base_url=service.http, timeout=60) as client:
        for body, headers, status in HTTP_ATTACKS:
            content = json.dumps(body).encode() if isinstance(body, dict) else body
            answer = client.post("/v2/models/reward/infer", content=content, headers=headers)
            assert answer.status_code == status, (content[:100], answer.text[:300])
            assert answer.json()["error"]
        assert client.post("/v2/models/reward/infer", json={"inputs": [tensor([[5, 6]])]}).status_code == 200
        wide = {"inputs": [tensor([[5] * CONTEXT] * 64)], "outputs": [{"name": "logits"}]}
        assert "max_logits_bytes" in client.post("/v2/models/reference/infer", json=wide).json()["error"]


def test_bombs_take_no_memory(service: Service) -> None:
    bomb = gzip.compress(bytes(512 * MIB), 9)
    assert len(bomb) < MIB
    with httpx.Client(base_url=service.http, timeout=60) as client, memory_bound("doors", 64 * MIB), memory_bound("Proxy", 192 * MIB):
        for _ in range(3):
            answer = client.post("/v2/models/reward/infer", content=bomb, headers={"Content-Encoding": "gzip"})
            assert answer.status_code == 413
        streamed = (bytes(MIB) for _ in range(64))
        with suppress(httpx.TransportError):  # the connection is closed within the body, which httpx may see before the answer
            assert client.post("/v2/models/reward/infer", content=streamed).status_code == 413
        assert client.post("/v2/models/reward/infer", json={"inputs": [tensor([[5, 6]])]}).status_code == 200


def test_fuzzed_by_its_own_page(service: Service, tmp_path: Path) -> None:
    command = [client_python("schemathesis").with_name("schemathesis"), "run", f"{service.http}/openapi.json"]
    # The page cannot say that a tensor's data fits its shape: what it allows may be refused all the same.
    options = [
        "--exclude-checks",
        "positive_data_acceptance",
        "--max-examples",
        "5",
        "--seed",
        "1",
        "--phases",
        "examples,coverage,fuzzing",
    ]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-4000:]
    assert httpx.get(f"{service.http}/v2/health/ready").status_code == 200


def test_new_doors_take_over(service: Service) -> None:
    """A changed setting replaces the doors under load: open channels go on, and lose at most the call that met the closing."""
    changed = service.doors.model_copy(update={"max_request_sequences": 512})
    stop = threading.Event()

    def load() -> tuple[int, list[grpc.StatusCode]]:
        answered, cut = 0, []
        with grpc.insecure_channel(service.grpc) as channel:
            while not stop.is_set():
                try:
                    ask(channel, "ModelInfer", infer_message())
                    answered += 1
                except grpc.RpcError as error:
                    cut.append(error.code())
        return answered, cut

    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(load) for _ in range(4)]
        try:
            deploy([target(scoring_application(models(service.folders), doors=changed), "scoring", "/")], DEADLINE)
            config = httpx.get(f"{service.http}/v2/models/reward/config", timeout=30).json()
        finally:
            stop.set()
    assert config["max_batch_size"] == 512
    for answered, cut in (future.result() for future in running):
        assert answered > 10
        assert len(cut) <= 2 and set(cut) <= {grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE}


def kill(name: str) -> None:
    """SIGKILL for the one process whose actor class holds `name`."""
    (process,) = {actor.pid for actor in list_actors(filters=[("state", "=", "ALIVE")]) if name in actor.class_name}
    os.kill(process, signal.SIGKILL)


def test_deaths(service: Service) -> None:
    """The gRPC door needs neither Serve's proxy nor its controller; what dies comes back; no answer is ever wrong."""
    message = infer_message()
    expected = direct_answers(service.folders, np.array([[5, 6, 7]]), np.ones((1, 3), int))["rewards"]

    def over_grpc() -> float:
        with grpc.insecure_channel(service.grpc) as channel:
            answer = pb.ModelInferResponse.FromString(ask(channel, "ModelInfer", message))
        return float(np.frombuffer(answer.raw_output_contents[0], np.float32)[0])

    def over_http() -> float:
        answer = httpx.post(f"{service.http}/score", json={"model": "reward", "ids": [[5, 6, 7]]}, timeout=30)
        return float(answer.raise_for_status().json()["rewards"][0])

    def comes_back(way: Callable[[], float]) -> None:
        def answers() -> bool:
            try:
                assert way() == pytest.approx(expected[0], abs=1e-5)
            except (grpc.RpcError, httpx.HTTPError):
                return False
            return True

        wait_until(answers, "an answer", seconds=DEADLINE, pause=0.2)

    unharmed_by: dict[str, tuple[Callable[[], float], ...]] = {
        "ServeController": (over_grpc, over_http),
        "Proxy": (over_grpc,),
        "scoring:reward": (),
        "scoring:doors": (),
    }
    for victim, unharmed in unharmed_by.items():
        kill(victim)
        for _ in range(20):
            for way in unharmed:
                assert way() == pytest.approx(expected[0], abs=1e-5), victim
        for way in (over_grpc, over_http):
            comes_back(way)
