"""A real Triton server to compare the scoring service with, out of another Python's package `nvidia-pytriton`, which carries it.

    python3.11 -m venv /tmp/triton && /tmp/triton/bin/pip install nvidia-pytriton

Its model is bench/triton_model.py in Triton's Python backend, with the dynamic batcher on. That Python has Triton's public client, too.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from app.experience import IntArray

HERE = Path(__file__).parent
NAME = "reference"
START_SECONDS = 60.0

CONFIG = """\
backend: "python"
max_batch_size: {rows}
dynamic_batching {{ max_queue_delay_microseconds: {microseconds} }}
instance_group [{{ kind: KIND_CPU, count: 1 }}]
input [{{ name: "input_ids", data_type: TYPE_INT32, dims: [-1], allow_ragged_batch: true }}]
output [{{ name: "logprobs", data_type: TYPE_FP32, dims: [-1] }}]
parameters [
  {{ key: "path", value: {{ string_value: "{path}" }} }},
  {{ key: "threads", value: {{ string_value: "{threads}" }} }}
]
"""
"""Rows of any length share a batch, as many as ours take with the longest row. Without `allow_ragged_batch` only rows of one length do."""


@contextmanager
def triton_server(python: str, model: str, folder: Path, *, threads: int, rows: int, wait_seconds: float) -> Iterator[int]:
    """The gRPC port of a server that gives log-probs of `model`. Raises RuntimeError, with the end of its log, where it does not start."""
    repository, backends = folder / "models", folder / "backends"
    config = CONFIG.format(rows=rows, microseconds=round(1e6 * wait_seconds), path=model, threads=threads)
    (repository / NAME / "1").mkdir(parents=True)
    (repository / NAME / "config.pbtxt").write_text(config)
    shutil.copy(HERE / "triton_model.py", repository / NAME / "1" / "model.py")
    package = _package(python)
    shutil.copytree(package / "backends", backends)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    shutil.copy(package / "python_backend_stubs" / version / "triton_python_backend_stub", backends / "python")
    http, grpc = _free_ports(2)
    address = [f"--{door}-{key}={value}" for door, port in (("http", http), ("grpc", grpc)) for key, value in _listen(port)]
    command = [str(package / "bin" / "tritonserver"), f"--model-repository={repository}", f"--backend-directory={backends}", *address]
    libraries = str(package.parent.parent / "nvidia_pytriton.libs")
    environment = {**os.environ, "PYTHONPATH": sysconfig.get_paths()["purelib"], "LD_LIBRARY_PATH": libraries}
    environment["OMP_NUM_THREADS"] = str(threads)
    with (folder / "triton.log").open("w") as log:
        server = subprocess.Popen([*command, "--allow-metrics=false"], env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            _wait_until_ready(server, http, folder / "triton.log")
            yield grpc
        finally:
            server.terminate()
            server.wait(60)


def asked_by_triton_clients(
    python: str, port: int, clients: int, rows: list[IntArray], folder: Path
) -> tuple[float, list[float], list[np.ndarray]]:
    """As `bench.scoring.asked_by`, by Triton's public client over gRPC; and the answers, in the order of the rows."""
    questions, answers = folder / "questions.npz", folder / "answers.npz"
    np.savez(questions, *rows)
    command = [python, *map(str, (HERE / "triton_clients.py", port, NAME, clients, questions, answers))]
    seconds = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    with np.load(answers) as found:
        return seconds["wall"], seconds["each"], [found[f"arr_{number}"] for number in range(len(rows))]


def _package(python: str) -> Path:
    """The server's folder in the environment of `python`."""
    code = "import importlib.util as find; print(find.find_spec('pytriton').submodule_search_locations[0])"
    return Path(subprocess.run([python, "-c", code], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()) / "tritonserver"


def _listen(port: int) -> list[tuple[str, str]]:
    return [("address", "127.0.0.1"), ("port", str(port))]


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _wait_until_ready(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=5):
                return
        except OSError:  # not yet
            time.sleep(0.5)
    reasons = [line for line in log.read_text().splitlines() if "rror" in line or line.startswith("E")]
    raise RuntimeError(f"Triton did not start: {' '.join(reasons)[-2000:]}")
