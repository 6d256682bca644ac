"""One run of the main job that the end-to-end tests share."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.command import (
    RUN_SECONDS,
    SHRUNKEN,
    environment,
    interrupt,
    kill_actor,
    kill_driver,
    require_gone,
    start,
    wait_for,
)
from tests.waiting import wait_until


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of three sessions of one command: stopped by SIGTERM in the middle of PPO; its driver killed in a step behind the
    last checkpoint; finished, although it loses a learner rank."""
    folder = tmp_path_factory.mktemp("pipeline")
    metrics = folder / "run" / "metrics.jsonl"
    log = folder / "first.log"
    command = ["pipeline", SHRUNKEN, f"--run.dir={folder / 'run'}", '--tracking.also=["wandb"]']
    offline = environment(WANDB_MODE="offline")
    process = start(command, log, offline)
    wait_for("ppo  1/10", log, process)
    assert interrupt(process, signal.SIGTERM) == 130, log.read_text()
    assert "a checkpoint is saved, the same command goes on from it" in log.read_text()
    before = metrics.read_text().count('"stage": "ppo"')
    log = folder / "second.log"
    process = start(command, log, offline)
    wait_until(
        lambda: metrics.read_text().count('"stage": "ppo"') > before,
        "another step",
        seconds=RUN_SECONDS,
        pause=0.2,
        process=process,
        log=log,
    )
    left_behind = kill_driver(process)
    log = folder / "third.log"
    process = start(command, log, offline)
    wait_for("ppo: going on from step", log, process)
    require_gone(left_behind, seconds=5)
    kill_actor(process, "LearnerWorker")
    code, output = process.wait(RUN_SECONDS), log.read_text()
    assert code == 0, output
    assert "sft: already finished" in output
    assert "died; the learner starts anew from the last checkpoint" in output
    assert output.count("ppo: going on from step") == 2
    return folder / "run"


@pytest.fixture(scope="session")
def summary(finished: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((finished / "summary.json").read_text())
    return loaded
