"""The other commands, on the models of the main job."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.config.loading import load_recipe
from app.durable import tree_hash
from tests.e2e.command import MINIMAL, ROOT, SHRUNKEN, interrupt, run, start, wait_for
from tests.tiny_models import make_foreign_reward_model


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
    """Two trials at a time that share one scoring service, by an algorithm without a critic; the reward model has another tokenizer."""
    folder, stranger = tmp_path / "run", make_foreign_reward_model(tmp_path / "stranger")
    models = [*given_models(finished)[:1], f"--reward.path={stranger}", "--ppo.algorithm.name=grpo", "--ppo.samples_per_prompt=4"]
    code, output = run(["tune", MINIMAL, f"--run.dir={folder}", *models], tmp_path / "log")
    assert code == 0, output
    results = json.loads((folder / "summary.json").read_text())["tune"]
    assert "reward.path: another tokenizer than the policy's; answers are scored as text" in (folder / "events.jsonl").read_text()
    assert len(results["trials"]) == 2
    assert all(trial["error"] is None for trial in results["trials"])
    assert len({trial["config"]["ppo.policy.lr"] for trial in results["trials"]}) == 2
    assert results["best"]["objective"] == max(trial["objective"] for trial in results["trials"])
    assert f"best: --ppo.policy.lr={results['best_config']['ppo.policy.lr']}" in output
    for trial in results["trials"]:
        assert trial["trial"] in (folder / "tune.html").read_text()
    code, output = run(["tune", "--promote", str(folder)], tmp_path / "promotion")
    assert code == 0, output
    promoted = json.loads((folder / "tune" / "best.manifest.json").read_text())
    assert promoted["model"]["sha256"] == tree_hash(Path(promoted["model"]["path"]))
    assert load_recipe(folder / "tune" / "best.toml").ppo.policy.lr == results["best_config"]["ppo.policy.lr"]


def test_serve_until_stopped(finished: Path, tmp_path: Path) -> None:
    """What PPO scores with, the reward model then swapped for another version by a hangup, behind the address that is printed."""
    log, recipe = tmp_path / "log", tmp_path / "serve.toml"
    log.touch()
    recipe.write_text("")
    ports = ["--http-port=0", "--grpc-port=0"]
    process = start(["serve", str(recipe), f"--run.dir={tmp_path / 'run'}", *ports, *given_models(finished)], log)
    wait_for("Ctrl-C stops", log, process)
    address = re.search(r"reward: reward model, version 1, weights \w{12}, (http://\S+)/v2/models/reward,", log.read_text())
    assert address, log.read_text()
    score = {"model": "reward", "ids": [[5, 6, 7]]}
    before = httpx.post(f"{address[1]}/score", json=score).raise_for_status().json()
    models = {
        name: f'serving.models.{name}.path = "{finished / folder / "model"}"' for name, folder in (("reward", "rm"), ("reference", "sft"))
    }
    recipe.write_text("\n".join([*models.values(), 'serving.models.reward.version = "2"']))
    process.send_signal(signal.SIGHUP)
    wait_for("reward: reward model, version 2", log, process)
    after = httpx.post(f"{address[1]}/score", json=score).raise_for_status().json()
    assert (before["version"], after["version"]) == ("1", "2")
    assert before["rewards"] == after["rewards"]
    assert interrupt(process, signal.SIGTERM) == 0, log.read_text()


def test_doctor(tmp_path: Path) -> None:
    code, output = run(["doctor", str(ROOT / "jobs" / "recipes" / "tiny" / "pipeline.toml")], tmp_path / "log")
    assert code == 0, output
    assert "corral pipeline" in output
    code, output = run(["doctor", str(ROOT / "jobs" / "recipes" / "pythia" / "ppo-12b.toml"), "--for=ppo"], tmp_path / "second.log")
    assert code == 1, output
    assert "FAILED recipe" in output
