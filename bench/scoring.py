"""What the scoring service takes beside the bare model: many clients, rows of mixed length, over handles and over gRPC.

The limit is a loop in the replica's own process that computes the very batches that the service had formed, while nobody asks. The two
take turns, so that whatever the machine does to one it does to the other; `ratio` is the loop's time in parts of the service's. Where
the rest of it goes: `slower`, the same batches taking longer while clients and routers use the same cores, and `idle`, the model waiting
for work.

    .venv/bin/python -m bench.scoring --model FOLDER --threads 2 --requests 4 --longest 128 --json
    .venv/bin/python -m bench.scoring --triton /tmp/triton/bin/python
    .venv/bin/python -m bench.scoring --load 10000

With `--triton` a real Triton server (see bench/triton_server.py) takes a turn in every round as well, and gRPC requests are those of
Triton's public client in a process of its own; without, those of a stub in this one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import pickle
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import torch
from ray import serve

from app.config.scoring import ScoringConfig
from app.config.served_models import REFERENCE
from app.config.serving import BatchingConfig, ServedModelConfig, ServingConfig
from app.config.shared import WorkersConfig
from app.experience import IntArray
from app.models.forward import pad_sequences, sequence_logprobs
from app.models.load import load_causal_lm, load_config, seen_from_anywhere
from app.workers.scoring_client import ServeScorer, flatten
from app.workers.scoring_messages import ScoringAnswer, ScoringRequest
from bench.triton_server import asked_by_triton_clients, triton_server
from jobs.local_ray import running_ray, uses_cluster
from serve.batching import Batch
from serve.deploying import deployed, target
from serve.doors import doors_application
from serve.protocol import open_inference_pb2 as pb
from serve.replicas import ModelReplica
from serve.scoring import model_options

APPLICATION = "bench"
SHORTEST = 4
BIG_VOCABULARY = 50_000
"""For which the bytes on the wire are compared."""

Ask = Callable[[IntArray], np.ndarray[Any, np.dtype[np.float32]]]
"""Log-probs of one row of tokens."""

Way = Callable[[list[IntArray]], tuple[float, list[float]]]
"""All clients ask for their share of the rows: seconds of all, and of each call."""


class RecordingReplica(ModelReplica):
    """A replica that remembers its batches, and computes them again when asked."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._batches: list[list[IntArray]] = []
        self._seconds = 0.0

    def _compute(self, batch: Batch[Any]) -> Any:
        began = time.perf_counter()
        try:
            return super()._compute(batch)
        finally:
            self._seconds += time.perf_counter() - began
            self._batches.append([ids for work in batch.items for ids in work.sequences])

    async def replay(self) -> dict[str, float]:
        """The batches since the last call, in a bare loop: seconds in the service and in the loop; batches, rows, tokens, padding."""
        batches, served = self._batches, self._seconds
        self._batches, self._seconds = [], 0.0
        padding: list[int] = []

        def loop() -> float:
            began = time.perf_counter()
            for rows in batches:
                self._loaded.model.answers(rows, self._config.batching.max_batch_tokens, on_padding=padding.append)
            return time.perf_counter() - began

        seconds = await asyncio.get_running_loop().run_in_executor(None, loop)
        tokens = sum(len(ids) for rows in batches for ids in rows)
        sizes = {"batches": len(batches), "rows": sum(map(len, batches)), "tokens": tokens, "padding": sum(padding)}
        return {"served_seconds": served, "bare_seconds": seconds, **sizes}


@dataclass(frozen=True)
class Service:
    """A running service: its client, and the port of its gRPC door."""

    scorer: ServeScorer
    port: int

    def over_handles(self) -> Ask:
        return lambda ids: self.scorer.logprobs([ids]).result()[0]

    def over_grpc(self) -> Ask:
        channel = grpc.insecure_channel(f"127.0.0.1:{self.port}", [("grpc.use_local_subchannel_pool", 1)])
        call = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=pb.ModelInferRequest.SerializeToString,
            response_deserializer=pb.ModelInferResponse.FromString,
        )

        def ask(ids: IntArray) -> np.ndarray[Any, np.dtype[np.float32]]:
            message = pb.ModelInferRequest(model_name=REFERENCE, raw_input_contents=[ids.tobytes()])
            message.inputs.add(name="input_ids", datatype="INT32", shape=[1, len(ids)])
            return np.frombuffer(call(message, timeout=120.0).raw_output_contents[0], dtype=np.float32)

        return ask


@contextmanager
def running(model: str, threads: int, logs: Path) -> Iterator[Service]:
    """The service of one model with one replica."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = WorkersConfig(cpus=0.25, threads=threads)
    config = ServedModelConfig(path=model, kind="reference", workers=workers, batching=BatchingConfig(), timeout_seconds=120)
    replica = serve.deployment(name=REFERENCE, **model_options(config))(RecordingReplica).bind(REFERENCE, config)
    application = doors_application({REFERENCE: replica}, ServingConfig(grpc_port=port))
    with running_ray(logs), deployed([target(application, APPLICATION)], deadline_seconds=120, stop_serve=uses_cluster()):
        yield Service(ServeScorer(APPLICATION, ScoringConfig(reference=workers)), port)


def rows_of_tokens(count: int, longest: int, vocabulary: int, seed: int) -> list[IntArray]:
    """Random rows of 4 to `longest` tokens, half of them shorter than their geometric mean."""
    random = np.random.default_rng(seed)
    lengths = np.exp(random.uniform(np.log(SHORTEST), np.log(longest), count)).round().astype(int)
    return [random.integers(0, vocabulary, length).astype(np.int32) for length in lengths]


def asked_by(clients: int, asks: list[Ask], rows: list[IntArray]) -> tuple[float, list[float]]:
    """Each client asks for its rows one after the other: seconds of all, and of each."""

    def work(client: int) -> list[float]:
        seconds = []
        for ids in rows[client::clients]:
            began = time.perf_counter()
            answer = asks[client % len(asks)](ids)
            seconds.append(time.perf_counter() - began)
            assert answer.size == len(ids) - 1
        return seconds

    with ThreadPoolExecutor(clients) as pool:
        began = time.perf_counter()
        each = list(pool.map(work, range(clients)))
        return time.perf_counter() - began, [seconds for client in each for seconds in client]


def throughput(service: Service, arguments: argparse.Namespace, vocabulary: int, folder: Path, triton: int | None) -> dict[str, Any]:
    """Per way in: medians over the rounds; the first round warms up. triton: its server's port, whose `ahead` is the gRPC door's
    tokens/s in parts of Triton's."""

    def by_stub(asks: list[Ask]) -> Way:
        return lambda rows: asked_by(arguments.clients, asks, rows)

    def by_triton_client(port: int) -> Way:
        return lambda rows: _checked(asked_by_triton_clients(arguments.triton, port, arguments.clients, rows, folder), answers)

    answers: list[list[np.ndarray]] = []
    ways = {"handles": by_stub([service.over_handles()])}
    ways["grpc"] = by_triton_client(service.port) if triton else by_stub([service.over_grpc() for _ in range(arguments.channels)])
    if triton:
        ways["triton"] = by_triton_client(triton)
    rounds: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    handle = service.scorer.handle(REFERENCE)
    for number in range(arguments.rounds + 1):
        rows = rows_of_tokens(arguments.clients * (arguments.requests if number else 1), arguments.longest, vocabulary, seed=number)
        answers.clear()
        for way, ask in ways.items():
            wall, latencies = ask(rows)
            measured = rates(wall, latencies, rows)
            if way != "triton":
                measured |= shares(wall, handle.replay.remote().result(timeout_s=300))
            if number:
                rounds[way].append(measured)
                sys.stderr.write(f"round {number}, {way}: {measured}\n")
    found: dict[str, Any] = {way: {key: statistics.median(one[key] for one in each) for key in each[0]} for way, each in rounds.items()}
    if triton:
        pairs = zip(rounds["grpc"], rounds["triton"], strict=True)
        ahead = [ours["tokens_per_second"] / theirs["tokens_per_second"] for ours, theirs in pairs]
        found["ahead"] = {"each": ahead, "median": statistics.median(ahead)}
    return found


def _checked(asked: tuple[float, list[float], list[np.ndarray]], before: list[list[np.ndarray]]) -> tuple[float, list[float]]:
    """Both servers must have given the same answers to the same rows."""
    wall, latencies, answers = asked
    for others in before:
        worst = max(float(np.abs(answer - other).max(initial=0)) for answer, other in zip(answers, others, strict=True))
        assert worst < 1e-4, f"Triton's answers differ from ours by {worst:.3g}"
    before.append(answers)
    return wall, latencies


def rates(wall: float, latencies: list[float], rows: list[IntArray]) -> dict[str, float]:
    p50, p99 = np.quantile(latencies, [0.5, 0.99])
    return {
        "tokens_per_second": sum(map(len, rows)) / wall,
        "requests_per_second": len(rows) / wall,
        "p50_ms": 1e3 * float(p50),
        "p99_ms": 1e3 * float(p99),
    }


def shares(wall: float, replay: dict[str, float]) -> dict[str, float]:
    """Parts of a round's wall time, ratio + slower + idle = 1; and its batches."""
    bare, served = replay["bare_seconds"], replay["served_seconds"]
    return {
        "ratio": bare / wall,
        "slower": (served - bare) / wall,
        "idle": (wall - served) / wall,
        "rows_per_batch": replay["rows"] / replay["batches"],
        "padding": replay["padding"] / (replay["tokens"] + replay["padding"]),
    }


def overhead(service: Service, vocabulary: int, calls: int = 40) -> dict[str, float]:
    """Medians in ms of calls one after the other: a call that computes nothing, a call of one short row, what the model takes of it, and
    what batching and checks add (the wait for more callers is part of it)."""
    handle = service.scorer.handle(REFERENCE)
    (ids,) = rows_of_tokens(1, SHORTEST, vocabulary, seed=0)
    handle.replay.remote().result(timeout_s=60)
    empty: list[float] = []
    full: list[float] = []
    request = ScoringRequest(*flatten([ids]), "logprobs")
    for _ in range(calls):
        for milliseconds, call in ((empty, handle.describe.remote), (full, partial(handle.infer.remote, request))):
            began = time.perf_counter()
            call().result(timeout_s=60)
            milliseconds.append(1e3 * (time.perf_counter() - began))
    compute = 1e3 * handle.replay.remote().result(timeout_s=60)["served_seconds"] / calls
    call_ms, infer_ms = statistics.median(empty), statistics.median(full)
    wait_ms = 1e3 * BatchingConfig().wait_seconds
    return {"empty_call": call_ms, "call": infer_ms, "model": compute, "wait": wait_ms, "rest": infer_ms - call_ms - compute - wait_ms}


def wire(service: Service, vocabulary: int) -> dict[str, float]:
    """Bytes that an answer takes per token, and how many times as many float16 logits of a vocabulary of 50,000 would be."""
    rows = rows_of_tokens(32, 128, vocabulary, seed=1)
    answer: ScoringAnswer = service.scorer.handle(REFERENCE).infer.remote(ScoringRequest(*flatten(rows), "logprobs")).result(timeout_s=120)
    buffers: list[pickle.PickleBuffer] = []
    envelope = pickle.dumps(answer, protocol=5, buffer_callback=buffers.append)
    per_token = (len(envelope) + sum(buffer.raw().nbytes for buffer in buffers)) / sum(map(len, rows))
    return {"bytes_per_token": per_token, "factor": 2 * BIG_VOCABULARY / per_token, "factor_own_vocabulary": 2 * vocabulary / per_token}


@torch.inference_mode()
def load(service: Service, arguments: argparse.Namespace, model: str, vocabulary: int) -> dict[str, float]:
    """`--load` requests of random lengths; every answer beside a forward pass of its row alone. Fails where one differs by 1e-5."""
    rows = rows_of_tokens(arguments.load, arguments.longest, vocabulary, seed=2)
    ask = service.over_handles()
    began = time.perf_counter()
    with ThreadPoolExecutor(arguments.clients) as pool:
        answers = list(pool.map(ask, rows))
    seconds = time.perf_counter() - began
    torch.set_num_threads(arguments.threads)
    direct = load_causal_lm(model)
    worst = max(
        float(np.abs(answer - sequence_logprobs(direct, *pad_sequences([ids]))[0].numpy()).max())
        for ids, answer in zip(rows, answers, strict=True)
    )
    assert worst < 1e-5, f"an answer differs from the direct forward pass by {worst:.3g}"
    return {"requests": len(answers), "seconds": seconds, "requests_per_second": len(answers) / seconds, "largest_difference": worst}


def small_model(folder: Path) -> str:
    """A GPT-NeoX of 3.7 million parameters with random weights."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 1024, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = GPTNeoXConfig(**sizes, max_position_embeddings=512, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    return str(folder)


def triton_of(arguments: argparse.Namespace, model: str, folder: Path) -> AbstractContextManager[int | None]:
    """The port of Triton's server, with batches as large as ours may be; None where none is asked for."""
    if arguments.triton is None:
        return nullcontext()
    batching = BatchingConfig()
    rows = max(1, batching.max_batch_tokens // arguments.longest)
    return triton_server(arguments.triton, model, folder, threads=arguments.threads, rows=rows, wait_seconds=batching.wait_seconds)


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    model = seen_from_anywhere(arguments.model) if arguments.model else small_model(folder / "model")
    vocabulary = int(load_config(model, False).get_text_config().vocab_size)
    with running(model, arguments.threads, folder / "logs") as service:
        if arguments.load:
            return load(service, arguments, model, vocabulary)
        with triton_of(arguments, model, folder) as triton:
            measured = throughput(service, arguments, vocabulary, folder, triton)
        return {
            "throughput": measured,
            "overhead_ms": overhead(service, vocabulary),
            "wire": wire(service, vocabulary),
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a language model; default: 3.7 million random parameters")
    parser.add_argument("--threads", type=int, default=1, help="of the model")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--channels", type=int, default=4, help="gRPC channels that the clients share")
    parser.add_argument("--requests", type=int, default=16, help="of each client in each round, of one row each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--longest", type=int, default=256, help="tokens of the longest row")
    parser.add_argument("--triton", metavar="PYTHON", help="Python that has nvidia-pytriton: compare with its Triton server")
    parser.add_argument("--load", type=int, help="only send so many requests and compare each answer with the direct forward pass")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(arguments, Path(folder))
    sys.stdout.write(json.dumps(result, indent=None if arguments.json else 2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
