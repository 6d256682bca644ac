"""W&B and MLflow, offline: what is logged is really there, a resumed run goes on, and a service that fails stops nothing."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from app.config.loading import load_recipe
from app.config.recipe import Recipe
from app.display import PlainDisplay
from app.errors import ConfigError
from app.trackers import delivery
from app.trackers.delivery import Delivery
from app.trackers.opening import IDS_FILE, open_services, require_packages
from app.trackers.service import Point
from app.tracking import RunTracker
from tests.waiting import wait_until

needs_wandb = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
needs_mlflow = pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="mlflow-skinny is not installed")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    yield
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()  # it reads its environment once a process


def recipe(*services: str, **keys: str) -> Recipe:
    return load_recipe(None, [f"--tracking.also={json.dumps(services)}", *(f"--{name}={value}" for name, value in keys.items())])


def train(run: Path, steps: Sequence[int], recipe: Recipe, out: io.StringIO | None = None) -> str:
    """A session of a run; returns what its display showed."""
    out = out or io.StringIO()
    with RunTracker(run, display=PlainDisplay(out), services=open_services(recipe, run)) as tracker:
        for step in steps:
            tracker.log("sft", step, {"loss": 1 / step, "grad_norm": math.nan})
        tracker.log("ppo", 1, {"seconds/rollout": 2.5, "share of {a, b}": 0.5})
    return out.getvalue()


def wandb_records(file: Path) -> Iterator[Any]:
    """The protobuf records of a .wandb file: LevelDB's log format behind a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, whole = file.read_bytes(), 7, b""
    while at < len(content):
        room = 2**15 - at % 2**15
        if room < 7:
            at += room
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # full, or the last part
            yield Record.FromString(whole)
            whole = b""


@needs_wandb
def test_wandb_keeps_every_metric_in_the_run_folder_and_a_second_session_goes_on_with_the_run(tmp_path: Path) -> None:
    run = tmp_path / "demo"
    run.mkdir()
    shown = train(run, [1, 2], recipe("wandb", **{"ppo.kl.coef": "0.125"}))
    assert "wandb: offline, `wandb sync " in shown
    first_id = json.loads((run / IDS_FILE).read_text())["wandb"]
    train(run, [2, 3], recipe("wandb", **{"run.deadline_seconds": "60"}))
    assert json.loads((run / IDS_FILE).read_text())["wandb"] == first_id
    files = sorted(run.glob("wandb/offline-run-*/*.wandb"))
    assert [file.name for file in files] == [f"run-{first_id}.wandb"] * 2
    rows, names, config, exits = [], set(), {}, []
    for file in files:
        for record in wandb_records(file):
            match record.WhichOneof("record_type"):
                case "run":
                    names.add((record.run.run_id, record.run.project, record.run.display_name))
                    config |= {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.run.config.update}
                case "history":
                    rows.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item})
                case "exit":
                    exits.append(record.exit.exit_code)
    assert names == {(first_id, "corral", "demo")}
    assert config["ppo.kl.coef"] == 0.05
    assert config["run.deadline_seconds"] == 60
    assert [(row["sft/step"], row["sft/loss"]) for row in rows if "sft/loss" in row] == [(1, 1.0), (2, 0.5), (2, 0.5), (3, 1 / 3)]
    assert math.isnan(rows[0]["sft/grad_norm"])
    assert [(row["ppo/step"], row["ppo/seconds/rollout"]) for row in rows if "ppo/step" in row] == [(1, 2.5)] * 2
    assert exits == [0, 0]


@needs_mlflow
def test_mlflow_has_every_metric_and_a_second_session_goes_on_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "demo"
    run.mkdir()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/shared.db")
    asked = recipe("mlflow", **{"tracking.project": "pets", "tracking.name": "cats", "ppo.kl.coef": "0.125"})
    shown = train(run, [1, 2], asked)
    assert f"mlflow: sqlite:///{tmp_path}/shared.db, run " in shown
    train(run, [2, 3], asked)
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/shared.db")
    experiment = client.get_experiment_by_name("pets")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_id == json.loads((run / IDS_FILE).read_text())["mlflow"]
    assert (found.info.run_name, found.info.status) == ("cats", "FINISHED")
    assert found.data.params["ppo.kl.coef"] == "0.125"
    history = client.get_metric_history(found.info.run_id, "sft/loss")
    assert sorted((metric.step, metric.value) for metric in history) == [(1, 1.0), (2, 0.5), (2, 0.5), (3, 1 / 3)]
    assert math.isnan(found.data.metrics["sft/grad_norm"])
    assert (found.data.metrics["ppo/seconds/rollout"], found.data.metrics["ppo/share of _a_ b_"]) == (2.5, 0.5)
    with pytest.raises(ZeroDivisionError):
        train(run, [0], asked)
    assert client.get_run(found.info.run_id).info.status == "FAILED"

    (run / IDS_FILE).write_text('{"mlflow": "0123456789abcdef0123456789abcdef"}')
    with pytest.raises(ConfigError, match=r"tracking\.also = mlflow: the run cannot be opened there \(MlflowException: .*not found"):
        open_services(asked, run)


@needs_mlflow
def test_the_address_of_mlflow_is_shown_without_its_password(tmp_path: Path) -> None:
    from app.trackers.mlflow_run import CREDENTIALS

    assert CREDENTIALS.sub("", "https://me:secret@host:5000/mlflow") == "https://host:5000/mlflow"
    assert CREDENTIALS.sub("", f"sqlite:///{tmp_path}/a@b.db") == f"sqlite:///{tmp_path}/a@b.db"


@needs_mlflow
def test_an_mlflow_server_that_does_not_answer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ConfigError, match=r"tracking\.also = mlflow: .*127\.0\.0\.1.*check the service's address"):
        open_services(recipe("mlflow"), tmp_path)


@needs_wandb
def test_wandb_without_a_key_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with pytest.raises(ConfigError, match=r"tracking\.also = wandb: .*API key"):
        open_services(recipe("wandb"), tmp_path)


KILL_WANDB = """
import sys
from pathlib import Path
import psutil
from app.config.loading import load_recipe
from app.tracking import RunTracker
from app.trackers.opening import open_services

run = Path(sys.argv[1])
with RunTracker(run, services=open_services(load_recipe(None, ['--tracking.also=["wandb"]']), run)) as tracker:
    (service,) = [child for child in psutil.Process().children(recursive=True) if child.name() == "wandb-core"]
    service.kill()
    service.wait()
    for step in range(1, 6):
        tracker.log("sft", step, {"loss": 1.0})
"""


@needs_wandb
def test_training_goes_on_when_the_process_of_wandb_dies(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILL_WANDB, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("wandb: not reached") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5


def test_a_missing_package_is_named_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    require_packages(recipe().tracking)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"tracking\.also = mlflow: .*pip install mlflow-skinny"):
        require_packages(recipe("mlflow").tracking)


class Flaky:
    """A service that fails while it is `down`."""

    run_id, address = "1", "here"

    def __init__(self) -> None:
        self.down = False
        self.hangs = threading.Event()
        self.steps: list[int] = []
        self.closed: bool | None = None

    def log(self, points: Sequence[Point]) -> None:
        self.hangs.wait(0.0 if not self.down else 0.01)
        if self.down:
            raise ConnectionError("nobody there\nsecond line")
        self.steps += [point.step for point in points]

    def close(self, *, failed: bool) -> None:
        self.closed = failed


def test_what_a_service_did_not_take_is_offered_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "RETRY_SECONDS", 0.05)
    service, notes = Flaky(), list[str]()
    outbox = Delivery("flaky", service, notes.append)
    service.down = True
    for step in (1, 2):
        outbox.log(Point("sft", step, 0.0, {}))
    wait_until(lambda: bool(notes))
    service.down = False
    wait_until(lambda: service.steps == [1, 2])
    outbox.log(Point("sft", 3, 0.0, {}))
    outbox.close(failed=True)
    assert service.steps == [1, 2, 3]
    assert service.closed is True
    assert notes == ["flaky: not reached (ConnectionError: nobody there); training goes on, and metrics.jsonl has every metric"]


def test_what_never_arrived_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    service, notes = Flaky(), list[str]()
    service.down = True
    outbox = Delivery("flaky", service, notes.append)
    for step in (1, 2):
        outbox.log(Point("sft", step, 0.0, {}))
    wait_until(lambda: bool(notes))
    outbox.close(failed=False)
    assert notes[1:] == ["flaky: 2 logged points have not arrived there; metrics.jsonl has all of them"]


def test_a_service_that_hangs_delays_neither_training_nor_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "CLOSE_SECONDS", 0.2)
    release, answered = threading.Event(), threading.Event()

    class Hanging(Flaky):
        def log(self, points: Sequence[Point]) -> None:
            release.wait(60)
            answered.set()

    notes = list[str]()
    outbox = Delivery("slow", Hanging(), notes.append)
    for step in range(1000):
        outbox.log(Point("sft", step, 0.0, {}))
    outbox.close(failed=False)
    assert not answered.is_set(), "whoever logs or ends has not waited for the service"
    assert notes == ["slow: does not answer, the end of the run may be missing there"]
    release.set()


def test_services_are_imported_only_where_they_are_asked_for() -> None:
    code = "import sys, app.trackers.opening, jobs.session; sys.exit(bool({'wandb', 'mlflow'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
