"""The main job on a Ray that was started with `ray start --head`, over the job server and with token authentication."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.command import MINIMAL, ROOT, RUN_SECONDS
from tests.waiting import wait_until

PORT_OPTIONS = ("port", "dashboard-port", "ray-client-server-port", "dashboard-agent-listen-port", "metrics-export-port")


@dataclass(frozen=True)
class Head:
    address: str
    environment: dict[str, str]


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def wait_for_dashboard(address: str, token: str, seconds: float) -> None:
    request = urllib.request.Request(f"{address}/api/version", headers={"Authorization": f"Bearer {token}"})

    def answers() -> bool:
        try:
            with urllib.request.urlopen(request, timeout=5):
                return True
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    wait_until(answers, f"an answer of {address}", seconds=seconds, pause=1.0)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    folder = tempfile.mkdtemp(prefix="r", dir="/tmp")  # Ray's sockets need a short path
    token = secrets.token_hex(16)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = kept | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_TMPDIR": folder,
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # a stopping head would wait 30 s for actors that outlive their jobs
        "PATH": f"{Path(sys.executable).parent}:{kept['PATH']}",
    }
    ports = dict(zip(PORT_OPTIONS, free_ports(len(PORT_OPTIONS)), strict=True))
    options = [f"--{name}={port}" for name, port in ports.items()]
    process = subprocess.Popen(
        ["ray", "start", "--head", "--block", "--num-cpus=4", "--object-store-memory=300000000", "--disable-usage-stats", *options],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    address = f"http://127.0.0.1:{ports['dashboard-port']}"
    try:
        wait_for_dashboard(address, token, 120)
        yield Head(address, environment)
    finally:
        process.send_signal(signal.SIGTERM)  # --block takes its Ray processes along; `ray stop` would end those of others
        process.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


def check_run(folder: Path, *stages: str) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["ppo"]["steps"] == 2
    assert set(summary["ppo"]["gold_gain"]) == {"mean", "low", "high"}
    for stage in stages:
        assert (folder / stage / "model" / "config.json").is_file()


def test_both_ways_to_submit(head: Head, finished: Path, tmp_path: Path) -> None:
    """Two jobs at once on one cluster, each with its own run folder: a whole pipeline, and PPO on models that are there."""
    runs = {"corral": tmp_path / "submitted", "ray": tmp_path / "plain"}
    ours = [sys.executable, "-m", "jobs", "submit", MINIMAL, f"--address={head.address}", f"--run.dir={runs['corral']}"]
    models = [f"--model.path={finished}/sft/model", f"--reward.path={finished}/rm/model"]
    job = ["python", "-m", "jobs", "ppo", MINIMAL, f"--run.dir={runs['ray']}", *models]
    plain = ["ray", "job", "submit", f"--address={head.address}", "--working-dir=.", "--", *job]
    started = {
        name: subprocess.Popen(command, cwd=ROOT, env=head.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for name, command in (("corral", ours), ("ray", plain))
    }
    for name, process in started.items():
        output, _ = process.communicate(timeout=RUN_SECONDS)
        assert process.returncode == 0, output[-3000:]
        assert f"{runs[name]}/summary.json" in output
    check_run(runs["corral"], "sft", "rm", "ppo")
    check_run(runs["ray"], "ppo")


def test_a_failed_job_fails_the_submission(head: Head, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "jobs",
        "submit",
        MINIMAL,
        f"--address={head.address}",
        f"--run.dir={tmp_path / 'run'}",
        "--sft.workers.gpus=1",
    ]
    done = subprocess.run(command, cwd=ROOT, env=head.environment, capture_output=True, text=True, check=False, timeout=RUN_SECONDS)
    assert done.returncode == 2, done.stdout[-3000:]
    assert "needs 1 GPU" in done.stdout


def corral(head: Head, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jobs", *words, f"--address={head.address}"]
    return subprocess.run(command, cwd=ROOT, env=head.environment | more, capture_output=True, text=True, check=False, timeout=RUN_SECONDS)


def test_a_job_is_listed_stopped_and_left_with_a_checkpoint(head: Head, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    submitted = corral(head, "submit", "sft", MINIMAL, f"--run.dir={folder}", "--sft.epochs=10000", "--sft.max_steps=100000", "--no-follow")
    assert submitted.returncode == 0, submitted.stderr
    job = submitted.stdout.removeprefix("job ").partition(":")[0]
    wrong = corral(head, "stop", job, RAY_AUTH_TOKEN="wrong" * 8)
    assert wrong.returncode == 2
    assert "refuses the token" in wrong.stderr and wrong.stderr.count("\n") == 1
    metrics = folder / "metrics.jsonl"
    wait_until(lambda: metrics.is_file() and '"loss"' in metrics.read_text(), "a loss", seconds=RUN_SECONDS, pause=0.5)
    stopped = corral(head, "stop", job)
    assert stopped.returncode == 0, stopped.stderr
    assert f"job {job}: STOPPED" in stopped.stdout
    listed = json.loads(corral(head, "runs", str(folder), "--json").stdout)
    run = listed["runs"][0]
    assert (run["state"], run["job"], run["stage"]) == ("interrupted", job, "sft")
    assert {each["job"]: (each["state"], each["run"]) for each in listed["jobs"]}[job] == ("interrupted", str(folder))
    assert list((folder / "sft" / "checkpoints").glob("step-*/manifest.json"))
    assert "sft  0/100000  started" in corral(head, "logs", job).stdout
