"""The other commands, on the models of the main job."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.command import MINIMAL, ROOT, SHRUNKEN, interrupt, run, start, wait_for


def given_models(finished: Path) -> list[str]:
    """Options that name the run's models by paths relative to where the command is typed."""
    here = os.path.relpath(finished, ROOT)
    return [f"--model.path={here}/sft/model", f"--reward.path={here}/rm/model"]


def test_evaluate_again(finished: Path, tmp_path: Path, summary: dict[str, Any]) -> None:
    code, output = run(["evaluate", SHRUNKEN, f"--run.dir={finished}"], tmp_path / "log")
    assert code == 0, output
    again = json.loads((finished / "summary.json").read_text())["evaluation"]
    # the same prompts and seeds: the SFT model's answers are the same, those of the exported PPO model nearly
    assert again["gold_before"] == summary["ppo"]["gold_before"]
    assert again["gold_after"]["mean"] == pytest.approx(summary["ppo"]["gold_after"]["mean"], abs=0.05)


def test_search_over_ppo_with_these_models(finished: Path, tmp_path: Path) -> None:
    """Two trials at a time that share one scoring service, by an algorithm without a critic."""
    folder = tmp_path / "run"
    models = [*given_models(finished), "--ppo.algorithm.name=grpo", "--ppo.samples_per_prompt=4"]
    code, output = run(["tune", MINIMAL, f"--run.dir={folder}", *models], tmp_path / "log")
    assert code == 0, output
    results = json.loads((folder / "summary.json").read_text())["tune"]
    assert len(results["trials"]) == 2
    assert all(trial["error"] is None for trial in results["trials"])
    assert len({trial["config"]["ppo.policy.lr"] for trial in results["trials"]}) == 2
    assert results["best"]["objective"] == max(trial["objective"] for trial in results["trials"])
    assert f"best: --ppo.policy.lr={results['best_config']['ppo.policy.lr']}" in output


def test_serve_until_stopped(finished: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.touch()
    models = given_models(finished)
    process = start(["serve", MINIMAL, f"--run.dir={tmp_path / 'run'}", *models], log)
    wait_for("Ctrl-C stops it", log, process)
    assert interrupt(process, signal.SIGTERM) == 0, log.read_text()


def test_doctor(tmp_path: Path) -> None:
    code, output = run(["doctor", str(ROOT / "jobs" / "recipes" / "tiny" / "pipeline.toml")], tmp_path / "log")
    assert code == 0, output
    assert "corral pipeline" in output
    code, output = run(["doctor", str(ROOT / "jobs" / "recipes" / "pythia" / "ppo-12b.toml"), "--for=ppo"], tmp_path / "second.log")
    assert code == 1, output
    assert "FAILED recipe" in output
