"""The main job submitted to a Ray that was started with `ray start --head` and token authentication; and a search on it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.e2e.command import HERE, ROOT, environment, require_gone, run, until

RECIPE = f"{HERE}/minimal.toml"
RAY = str(Path(sys.executable).with_name("ray"))
PORTS = {"port": 17379, "dashboard-port": 17265, "ray-client-server-port": 17001, "dashboard-agent-listen-port": 17365, "metrics-export-port": 17080}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a user of a head node on this machine."""
    token = tmp_path_factory.mktemp("token") / "token"
    token.write_text("0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef")
    token.chmod(0o600)
    env = environment(
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN_PATH=str(token),
        RAY_TMPDIR=f"/tmp/e{os.getpid()}",
        RAY_API_SERVER_ADDRESS=f"http://127.0.0.1:{PORTS['dashboard-port']}",
        PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    )
    options = [f"--{name}={value}" for name, value in PORTS.items()]
    before = {process.pid for process in psutil.process_iter()}
    head = [RAY, "start", "--head", "--num-cpus=2", "--node-ip-address=127.0.0.1", "--object-store-memory=300000000", *options]
    subprocess.run(head, check=True, env=env, cwd=ROOT, capture_output=True, timeout=120)
    mine = [p for p in psutil.process_iter() if p.pid not in before and env["RAY_TMPDIR"] in " ".join(_command_line(p))]
    assert mine
    yield env
    tree = {child for process in mine if process.is_running() for child in [process, *process.children(recursive=True)]}
    for process in mine:
        if process.is_running():
            process.terminate()
    require_gone(list(tree), seconds=60)


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_corral_submit(cluster: dict[str, str], tmp_path: Path) -> None:
    code, output = run(["submit", RECIPE, f"--run.dir={tmp_path / 'run'}"], tmp_path / "log", cluster)
    assert code == 0, output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["ppo"]["steps"] == 2
    assert "ppo  2/2" in output  # the job's own lines are followed


def test_ray_job_submit_by_hand_and_a_search_over_it(cluster: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = [RAY, "job", "submit", "--working-dir", ".", "--", "python", "-m", "jobs", "tune", RECIPE, f"--run.dir={folder}"]
    done = subprocess.run(words, env=cluster, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((folder / "summary.json").read_text())["tune"]
    assert len(results["trials"]) == 4
    assert all(trial["error"] is None for trial in results["trials"])
    assert results["best"]["objective"] == max(trial["objective"] for trial in results["trials"])
    assert set(results["best_config"]) == {"ppo.policy.lr", "ppo.epochs"}


def test_a_failing_job_gives_its_exit_code(cluster: dict[str, str], tmp_path: Path) -> None:
    code, output = run(["submit", "ppo", RECIPE, f"--run.dir={tmp_path / 'run'}", "--ppo.workers.gpus=1"], tmp_path / "log", cluster)
    assert code == 2, output
    assert "needs 2 GPUs" in output
    until(lambda: not (tmp_path / "run").exists(), "leaving nothing behind", seconds=1)
