"""Callers of a running service, by its three ways in: handle, HTTP and gRPC; and load made of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import torch
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from app.config.serving import ServedModelConfig
from app.config.shared import WorkersConfig
from app.errors import ScoringError
from app.models.forward import pad_sequences, sequence_logprobs
from app.models.load import load_causal_lm
from app.workers.scoring_messages import ScoringRequest
from serve.protocol import open_inference_pb2 as pb
from tests.tiny_models import make_neox
from tests.waiting import wait_until

IDS = np.arange(4, 24, dtype=np.int32)
REQUEST = ScoringRequest(IDS, np.array([len(IDS)], dtype=np.int32), "logprobs")
DEADLINE = 60.0
PAUSE_SECONDS = 0.05
"""Of a caller between two requests, and between two looks: what is started under load shares the machine's cores with them."""
FAILURES = (ScoringError, RayError, RayServeException, TimeoutError, httpx.HTTPError, grpc.RpcError)


@dataclass(frozen=True)
class Answer:
    """logprobs [T - 1] for IDS, and the weights that they come from."""

    version: str
    weights_hash: str
    logprobs: np.ndarray


Ask = Callable[[], Answer]


@dataclass(frozen=True)
class Policies:
    """Two versions of a model: their folders, and the log-probs that each gives for IDS."""

    paths: Mapping[str, str]
    logprobs: Mapping[str, np.ndarray]

    @classmethod
    def make(cls, root: Path) -> Policies:
        paths = {version: make_neox(root / version, seed=int(version)) for version in ("1", "2")}
        with torch.no_grad():
            logprobs = {
                version: sequence_logprobs(load_causal_lm(path), *pad_sequences([IDS]))[0].numpy() for version, path in paths.items()
            }
        assert np.abs(logprobs["1"] - logprobs["2"]).max() > 0.01
        return cls(paths, logprobs)

    def config(self, version: str, cpus: float = 0.1, **more: Any) -> ServedModelConfig:
        return ServedModelConfig(path=self.paths[version], version=version, workers=WorkersConfig(cpus=cpus), **more)


def by_handle(handle: DeploymentHandle[Any]) -> Ask:
    """Connects the handle before any thread uses it: threads that find it unconnected make a router each, all report their load to
    the autoscaler under the one handle's id, and it knows only the last one's."""
    infer = handle.infer

    def ask() -> Answer:
        answer = infer.remote(REQUEST).result(timeout_s=DEADLINE)
        return Answer(answer.model.version, answer.model.weights_hash, answer.values)

    return ask


def by_http(port: int, model: str = "policy") -> Ask:
    """One connection for each caller: a caller that comes back must not wait for another one's."""
    local = threading.local()
    tensor = {"name": "input_ids", "datatype": "INT32", "shape": [1, len(IDS)], "data": IDS.tolist()}

    def ask() -> Answer:
        if not hasattr(local, "client"):
            local.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=DEADLINE)
        response = local.client.post(f"/v2/models/{model}/infer", json={"inputs": [tensor]})
        response.raise_for_status()
        body = response.json()
        (output,) = body["outputs"]
        return Answer(body["model_version"], body["parameters"]["weights_hash"], np.array(output["data"], dtype=np.float32).reshape(-1))

    return ask


def by_grpc(port: int, model: str = "policy") -> Ask:
    channel = grpc.insecure_channel(f"127.0.0.1:{port}")
    call = channel.unary_unary(
        "/inference.GRPCInferenceService/ModelInfer",
        request_serializer=pb.ModelInferRequest.SerializeToString,
        response_deserializer=pb.ModelInferResponse.FromString,
    )
    message = pb.ModelInferRequest(model_name=model, raw_input_contents=[IDS.tobytes()])
    message.inputs.add(name="input_ids", datatype="INT32", shape=[1, len(IDS)])

    def ask() -> Answer:
        response = call(message, timeout=DEADLINE, wait_for_ready=True)
        return Answer(
            response.model_version,
            response.parameters["weights_hash"].string_param,
            np.frombuffer(response.raw_output_contents[0], dtype=np.float32),
        )

    return ask


@dataclass
class Load:
    """Callers that ask again and again, what they were answered, and what failed."""

    answers: list[Answer] = field(default_factory=list)
    failures: list[Exception] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    def call(self, ask: Ask) -> None:
        while not self.stop.is_set():
            try:
                self.answers.append(ask())
            except FAILURES as failure:
                self.failures.append(failure)
            self.stop.wait(PAUSE_SECONDS)

    def go_on(self, answers: int) -> None:
        """Wait for so many more of them."""
        seen = len(self.answers)
        wait_until(lambda: len(self.answers) >= seen + answers, f"{answers} more answers", seconds=DEADLINE)


@contextmanager
def load(*callers: Ask) -> Iterator[Load]:
    """Load before, during and after the block."""
    under = Load()
    with ThreadPoolExecutor(len(callers)) as pool:
        futures = [pool.submit(under.call, ask) for ask in callers]
        try:
            under.go_on(2 * len(callers))
            yield under
            under.go_on(2 * len(callers))
        finally:
            under.stop.set()
    for future in futures:
        future.result()


def check_answers(answers: Sequence[Answer], expected: Mapping[str, np.ndarray]) -> None:
    """Each is wholly of the version that it names."""
    for answer in answers:
        np.testing.assert_allclose(answer.logprobs, expected[answer.version], atol=1e-5)
    assert len({(answer.version, answer.weights_hash) for answer in answers}) == len({answer.version for answer in answers})
