"""What state a run is in, from its files alone."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest

from app.config.recipe import Recipe
from app.display import PlainDisplay
from app.errors import CheckpointError
from app.process_record import me
from app.run_folder import RunFolder
from app.run_layout import LOG_FILE
from app.run_status import find_runs, last_points, read_status, session_state
from app.storage.place import open_place
from app.tracking import RunTracker


@pytest.mark.parametrize(
    ("session", "silent", "state"),
    [
        ({"outcome": "finished"}, 1e9, "finished"),
        ({"outcome": "interrupted", **me()}, 0, "interrupted"),
        (me(), 1e9, "running"),
        (me() | {"process_started": 1.0}, 0, "killed"),
        (me() | {"host": "elsewhere"}, 10, "running"),
        (me() | {"host": "elsewhere"}, 1e9, "unknown"),
        ({}, 1e9, "unknown"),
    ],
)
def test_states(session: dict[str, Any], silent: float, state: str) -> None:
    assert session_state(session, silent=silent, patience=60.0) == state


def test_only_complete_lines_count() -> None:
    def line(stage: str, step: int) -> str:
        return json.dumps({"time": 5.0 + step, "stage": stage, "step": step, "metrics": {}})

    text = "\n".join([line("sft", 3)[20:], line("sft", 4), line("ppo", 1), line("ppo", 2), line("ppo", 3)[:-9]])
    assert last_points(text) == {"sft": {"time": 9.0, "step": 4}, "ppo": {"time": 7.0, "step": 2}}
    assert last_points("") == {}


def open_run(path: Path) -> RunFolder:
    return RunFolder.open(Recipe.model_validate({"run": {"dir": str(path)}}), "pipeline")


def test_a_run_is_seen_at_every_moment_of_its_life(tmp_path: Path) -> None:
    place = open_place(str(tmp_path / "run"))
    assert read_status(place) is None
    run = open_run(tmp_path / "run")
    status = read_status(place)
    assert status is not None
    assert (status.state, status.command, status.stage, status.step, status.pid) == ("running", "pipeline", None, None, me()["pid"])
    run.stage("sft")
    run.finish("sft", {}, {})
    with contextlib.suppress(ValueError), RunTracker(run.path, display=PlainDisplay(io.StringIO())) as tracker:
        tracker.begin("ppo", 50, done=20)
        assert (read_status(place).step, read_status(place).steps) == (20, 50)  # type: ignore[union-attr]
        tracker.log("ppo", 21, {"loss": 1.0})
        tracker.note("canaries agree")
        raise ValueError("the loss is infinite: lower the rate\nTraceback")
    run.end_session("failed", "the loss is infinite")
    (status,) = find_runs(open_place(str(tmp_path)))
    assert (status.state, status.stage, status.step, status.finished_stages) == ("failed", "ppo", 21, ("sft",))
    assert status.reason == "the loss is infinite"
    assert status.as_dict()["run"] == str(tmp_path / "run")
    log = (run.path / LOG_FILE).read_text().splitlines()
    assert [line[21:] for line in log] == [
        "ppo  20/50  started",
        "ppo  21/50  loss 1",
        "canaries agree",
        "ValueError: the loss is infinite: lower the rate",
    ]


def test_runs_are_found_behind_a_url_and_a_broken_manifest_is_named(tmp_path: Path) -> None:
    for name in ("a", "b"):
        open_run(tmp_path / name).end_session("finished")
    (tmp_path / "no-run").mkdir()
    found = find_runs(open_place(f"file://{tmp_path}"))
    assert {status.run for status in found} == {f"file://{tmp_path}/a", f"file://{tmp_path}/b"}
    assert found[0].active is not None and found[1].active is not None and found[0].active >= found[1].active
    (tmp_path / "a" / "manifest.json").write_text("{")
    sound, broken = find_runs(open_place(str(tmp_path)))
    assert (sound.run, sound.state) == (str(tmp_path / "b"), "finished")
    assert (broken.run, broken.state, broken.active) == (str(tmp_path / "a"), "unreadable", None)
    assert broken.reason is not None and "a/manifest.json is no valid JSON" in broken.reason
    with pytest.raises(CheckpointError, match=r"a/manifest.json is no valid JSON"):
        find_runs(open_place(str(tmp_path / "a")))
    for spoilt in ({"sessions": 3}, {"sessions": [{}]}, {"sessions": ["word"]}, {"sessions": [me() | {"started": "today"}]}):
        (tmp_path / "a" / "manifest.json").write_text(json.dumps(spoilt))
        sound, broken = find_runs(open_place(str(tmp_path)))
        assert (sound.state, broken.state) == ("finished", "unreadable"), spoilt
        assert broken.reason is not None and "a: manifest.json or progress.json is none of a run (" in broken.reason


def test_the_job_of_a_run_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"metadata": {"job_submission_id": "raysubmit_1"}}))
    open_run(tmp_path / "run")
    status = read_status(open_place(str(tmp_path / "run")))
    assert status is not None
    assert status.job == "raysubmit_1"
