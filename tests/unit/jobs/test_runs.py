"""`corral runs`, `corral logs` and `corral stop` on run folders; what they say about jobs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.job_submission import JobStatus

from app.process_record import me
from app.run_layout import LOG_FILE
from jobs import run_control
from jobs.main import main
from jobs.run_control import command_of, stop_seconds
from jobs.runs import job_row

# a run that stops as ours do: SIGTERM, then a note in its manifest
RUNNING = """
import json, os, signal, sys, time
def stop(*_):
    manifest = json.load(open("manifest.json"))
    manifest["sessions"][-1]["outcome"] = "interrupted"
    json.dump(manifest, open("new", "w"))
    os.rename("new", "manifest.json")
    sys.exit(130)
signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
time.sleep(60)
"""

Output = Callable[[], str]


@pytest.fixture
def out(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Output:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(run_control, "LOOK_SECONDS", 0.02)
    return lambda: capfd.readouterr().out


def write_run(path: Path, **session: Any) -> Path:
    path.mkdir(parents=True)
    sessions = [{"command": "ppo", "started": 5.0, **me(), "job": None, **session}]
    (path / "manifest.json").write_text(json.dumps({"config": {}, "stages": {}, "sessions": sessions}))
    (path / "progress.json").write_text(json.dumps({"stage": "ppo", "steps": 50, "done": 20}))
    (path / LOG_FILE).write_text("one\ntwo\n")
    return path


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Path]:
    """The folder of a run whose process is there."""
    import psutil

    folder = write_run(tmp_path / "run")
    running = subprocess.Popen([sys.executable, "-c", RUNNING], cwd=folder, stdout=subprocess.PIPE)
    assert running.stdout is not None
    running.stdout.readline()
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sessions"][-1] |= {"pid": running.pid, "process_started": psutil.Process(running.pid).create_time()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    yield folder
    running.kill()
    running.wait()
    running.stdout.close()


def test_runs_are_listed_with_their_state(tmp_path: Path, out: Output) -> None:
    write_run(tmp_path / "a", outcome="failed", reason="loss is nan")
    write_run(tmp_path / "b", process_started=1.0)
    assert main(["runs", str(tmp_path)]) == 0
    text = out()
    assert [line.split()[1:5] for line in text.splitlines()[1:]] == [["failed", "ppo", "ppo", "20/50"], ["killed", "ppo", "ppo", "20/50"]]
    assert "loss is nan" in text
    assert main(["runs", f"file://{tmp_path}/a", "--json"]) == 0
    listed = json.loads(out())
    assert listed["jobs"] == []
    assert {key: listed["runs"][0][key] for key in ("state", "stage", "step", "steps", "reason")} == {
        "state": "failed",
        "stage": "ppo",
        "step": 20,
        "steps": 50,
        "reason": "loss is nan",
    }
    (tmp_path / "b" / "manifest.json").write_text("{")
    assert main(["runs", str(tmp_path)]) == 0
    text = out()
    assert text.splitlines()[1].split()[1] == "failed" and text.splitlines()[2].split()[1] == "unreadable"
    assert "manifest.json is no valid" in text
    assert main(["runs", str(tmp_path / "nowhere")]) == 0
    assert "no runs there" in out()


@pytest.mark.parametrize("address", ["local", ""])
def test_a_ray_of_a_commands_own_is_no_cluster_to_ask(
    tmp_path: Path, out: Output, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], address: str
) -> None:
    """`RAY_ADDRESS=local` starts one; Ray's client would ask whatever runs on this machine."""

    def asked(address: str | None) -> None:
        raise AssertionError("no cluster is named")

    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr("jobs.job_server.connect", asked)
    write_run(tmp_path / "a", outcome="finished")
    assert main(["runs", str(tmp_path)]) == 0
    assert "finished" in out()
    assert main(["logs", "mistyped"]) == 2
    assert "no such folder" in capfd.readouterr().err


def test_a_log_is_shown_and_followed_to_the_end_of_its_run(tmp_path: Path, out: Output) -> None:
    folder = write_run(tmp_path / "a", outcome="failed", reason="loss is nan")
    assert main(["logs", str(folder)]) == 0
    assert out() == "one\ntwo\n"
    assert main(["logs", str(folder), "--follow"]) == 1
    assert out() == f"one\ntwo\n{folder}: failed: loss is nan\n"


def test_a_run_is_stopped_and_says_how_it_goes_on(process: Path, out: Output) -> None:
    assert main(["stop", str(process)]) == 0
    text = out()
    assert "stops at its next safe point" in text
    assert text.endswith("interrupted; the command that started it goes on from there\n")
    assert main(["logs", str(process), "--follow"]) == 130
    out()
    assert main(["stop", str(process)]) == 0
    assert out() == f"{process}: interrupted already\n"


def test_a_search_is_not_said_to_save_what_it_does_not_save(process: Path, out: Output) -> None:
    manifest = json.loads((process / "manifest.json").read_text())
    manifest["sessions"][-1]["command"] = "tune"
    (process / "manifest.json").write_text(json.dumps(manifest))
    assert main(["stop", str(process)]) == 0
    text = out()
    assert "with a checkpoint" not in text and "go on from their last checkpoints (tune.save_every)" in text


@pytest.mark.parametrize(
    ("entrypoint", "command"),
    [
        ("python -m jobs tune recipe.toml --run.dir=/shared/a", "tune"),
        ("python -m jobs ppo jobs/tune.toml", "ppo"),
        ("python train.py tune", None),
        (None, None),
    ],
)
def test_the_command_of_a_job_is_read_from_its_entry_point(entrypoint: str | None, command: str | None) -> None:
    assert command_of(entrypoint) == command


def test_a_run_that_does_not_stop_in_time_is_told(
    tmp_path: Path, out: Output, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "a")
    monkeypatch.setattr(run_control.os, "kill", lambda pid, number: None)
    assert main(["stop", str(folder), "--wait", "0.05"]) == 1
    assert "has not ended after 0.05 s" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RAY_JOB_STOP_WAIT_TIME_S": "7200"}, "Ray kills it 7200 s after it was first asked"),
        ({}, "Ray kills it 3 s after it was first asked"),
    ],
)
def test_a_job_that_does_not_stop_in_time_is_not_told_to_be_asked_again(
    out: Output, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], variables: dict[str, str], said: str
) -> None:
    """Ray passes on the first request alone."""
    from jobs import job_server

    class Server:
        def get_job_info(self, job: str) -> Any:
            environment = {"env_vars": variables}
            return SimpleNamespace(status=JobStatus.RUNNING, runtime_env=environment, entrypoint="python -m jobs ppo recipe.toml")

        def stop_job(self, job: str) -> None:
            pass

    monkeypatch.setattr(job_server, "connect", lambda address: Server())
    assert main(["stop", "raysubmit_1", "--wait", "0.05"]) == 1
    error = capfd.readouterr().err
    assert "job raysubmit_1 has not ended after 0.05 s" in error and said in error
    assert "once more" not in error


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["logs", "{}/nowhere/run"], "no such folder"),
        (["logs", "{}"], "holds no run"),
        (["stop", "{}"], "holds no run"),
        (["stop", "{}/far"], "is run by process 7 on elsewhere: stop it there"),
        (["stop", "{}/contained"], "is run by process 7 on another machine or container of the name"),
        (["stop", "{}/root"], "belongs to another user"),
        (["runs", "nothing://x/y"], "DIR = nothing://x/y: cannot be opened"),
        (["runs", "{}/broken"], "is no valid JSON"),
        (["runs", "{}", "--run.seed=1"], "takes no recipe keys"),
        (["stop", "{}", "--run.seed=1"], "takes no recipe keys"),
        (["logs", "raysubmit_1", "--address", "http://127.0.0.1:9"], "no Ray cluster answers at http://127.0.0.1:9"),
        (["stop", "raysubmit_1", "--address", "ftp://x"], "such as http://head:8265"),
        (["runs", "{}/far", "--address", "http://127.0.0.1:9"], "no Ray cluster answers"),
    ],
)
def test_bad_input_is_told_in_one_line(
    tmp_path: Path, out: Output, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    def denied(pid: int, number: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setattr(run_control.os, "kill", denied)
    write_run(tmp_path / "far", host="elsewhere", pid=7)
    write_run(tmp_path / "contained", pid_namespace="pid:[1]", pid=7, started=time.time())
    write_run(tmp_path / "root")
    (write_run(tmp_path / "broken") / "manifest.json").write_text("{")
    assert main([word.format(tmp_path) for word in words]) == 2
    error = capfd.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_job_in_the_words_of_a_run() -> None:
    job = {"submission_id": "raysubmit_1", "status": "STOPPED", "metadata": {"corral_run": "/shared/a"}, "entrypoint": "python -m jobs"}
    row = job_row({**job, "start_time": 5000, "end_time": None, "driver_exit_code": None})
    assert (row["state"], row["run"], row["started"], row["ended"]) == ("interrupted", "/shared/a", 5.0, None)
    assert job_row({**job, "metadata": None})["run"] is None
    assert stop_seconds({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "1800"}}) == "1800"
    assert stop_seconds({"working_dir": "gcs://x"}) is None
    assert stop_seconds(None) is None


def test_nodes_that_do_not_see_the_run_folder_are_named() -> None:
    from jobs.shared_folder import blind

    assert blind(Path("/shared/run"), [("10.0.0.1", True)]) is None
    problem = blind(Path("/home/run"), [("10.0.0.3", False), ("10.0.0.1", True), ("10.0.0.2", False)])
    assert problem is not None
    assert problem.startswith("run folder /home/run is not seen from 10.0.0.2, 10.0.0.3: ")
