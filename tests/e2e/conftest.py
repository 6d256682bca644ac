"""One run of the main job that the end-to-end tests share."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.command import RUN_SECONDS, SHRUNKEN, environment, interrupt, kill_actor, start, wait_for


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder: stopped by SIGTERM in the middle of PPO, then finished by the same command, which loses a learner rank."""
    folder = tmp_path_factory.mktemp("pipeline")
    log = folder / "first.log"
    log.touch()
    command = ["pipeline", SHRUNKEN, f"--run.dir={folder / 'run'}", '--tracking.also=["wandb"]']
    offline = environment(WANDB_MODE="offline")
    process = start(command, log, offline)
    wait_for("ppo  1/10", log, process)
    assert interrupt(process, signal.SIGTERM) == 130, log.read_text()
    assert "a checkpoint is saved, the same command goes on from it" in log.read_text()
    log = folder / "second.log"
    log.touch()
    process = start(command, log, offline)
    wait_for("ppo: going on from step", log, process)
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
