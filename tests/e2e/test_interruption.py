"""SIGTERM in the middle of a pipeline: a clean end, no process left, and the same command goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STEPS = 4
COMMAND = [
    *(sys.executable, "-m", "jobs", "pipeline", "jobs/recipes/tiny/pipeline.toml"),
    *("--data.embedded.trees=64", "--sft.max_steps=2", "--rm.max_steps=2", "--rm.offset_samples=8"),
    *(f"--ppo.steps={STEPS}", "--ppo.batch_size=32", "--ppo.micro_batch_size=4", "--ppo.epochs=4"),
    *("--evaluation.prompts=8", "--evaluation.bootstrap=100"),
]


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    """With a folder of Ray's own, whose name also marks every process of the run."""
    folder = tempfile.mkdtemp(prefix="r", dir="/tmp")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    yield kept | {"RAY_TMPDIR": folder}
    shutil.rmtree(folder, ignore_errors=True)


def processes_of(environment: dict[str, str]) -> list[str]:
    """Command lines of the living processes that inherited the environment."""
    mark = f"RAY_TMPDIR={environment['RAY_TMPDIR']}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:  # gone, or not ours
            continue
    return found


def wait_for_line(path: Path, text: str, process: subprocess.Popen[str], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not (path.is_file() and text in path.read_text()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"no {text} in {path}"
        time.sleep(0.2)


def steps_of(run: Path) -> list[int]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row["step"] for row in rows if row["stage"] == "ppo"]


@pytest.mark.slow
def test_sigterm_stops_cleanly_and_the_same_command_goes_on(environment: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [*COMMAND, f"--run.dir={run}"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_line(run / "metrics.jsonl", '"stage": "ppo"', process, 400)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=180)
    assert process.returncode == 130, error[-3000:]
    assert "sft, rm" in error
    assert "same command" in error
    time.sleep(2.0)  # Ray's own agents notice the end of the raylet
    assert processes_of(environment) == []
    done_before = steps_of(run)
    assert max(done_before) < STEPS

    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=500)
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-3000:]
    assert sorted(steps_of(run)) == list(range(1, STEPS + 1))  # no step lost, none done twice
    assert json.loads((run / "summary.json").read_text())["ppo"]["steps"] == STEPS
