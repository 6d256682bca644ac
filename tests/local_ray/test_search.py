"""Searches on real Ray Tune whose trials are a formula: marks, retries, resumption, populations. Real ones: tests/e2e/test_commands.py."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ray

from app.config.loading import with_values
from app.config.recipe import Recipe
from app.stages.tuning.records import read_ended, read_history, trial_row, write_history
from app.stages.tuning.verdicts import best_row
from tests.local_ray.pretend_trials import TOGETHER, run_search

LR = {"type": "loguniform", "low": 0.01, "high": 1.0}


def recipe(space: dict[str, Any], **tune: Any) -> Recipe:
    values = {f"tune.{name}": value for name, value in tune.items()} | {"tune.space": space}
    return with_values(Recipe(), {"ppo.steps": 8, "ppo.epochs": 1, "ppo.workers.cpus": 0.1, "rollout.engines.cpus": 0.1, **values})


def rows(trials: list[Any]) -> list[dict[str, Any]]:
    return [trial_row(trial, 8) for trial in trials]


def begun(run: Path) -> list[list[float]]:
    """[process, step, learnt, learning rate, epochs] of every start of a trial."""
    return [[float(word) for word in line.split()] for line in (run / "begun").read_text().splitlines()]


def test_spoilt_trials_are_marked_and_a_killed_one_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    space = {"ppo.epochs": {"type": "grid", "values": [1, 2, 3, 4]}}
    searched = recipe(space, searcher="grid", scheduler="none", kl_budget=25.0, save_every=2, window=1)
    found = {row["config"]["ppo.epochs"]: row for row in rows(run_search(with_values(searched, {"ppo.policy.lr": 0.5}), tmp_path))}
    assert {epochs: row["status"] for epochs, row in found.items()} == {
        1: "finished", 2: "finished", 3: "over KL budget", 4: "non-finite",
    }  # fmt: skip
    assert found[3]["why"] == "KL 30 nats, tune.kl_budget = 25" and found[3]["steps"] == 3
    assert "loss is nan" in found[4]["why"]
    assert [start[1] for start in begun(tmp_path) if start[4] == 2] == [0, 2]
    assert found[2]["score"] == found[1]["score"] == 4.0
    assert len(read_history(tmp_path / "tune")[found[2]["trial"]]) == 8
    assert write_history(tmp_path / "tune").is_file()


def test_a_killed_search_repeats_no_finished_trial(tmp_path: Path) -> None:
    searched = recipe({"ppo.policy.lr": LR}, searcher="optuna", trials=6, concurrent=2, scheduler="asha", save_every=1, grace_steps=2)
    (tmp_path / "recipe.json").write_text(searched.model_dump_json())
    env = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    command = [sys.executable, "-m", "tests.local_ray.pretend_trials", str(tmp_path), str(tmp_path / "recipe.json")]
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(before := read_ended(tmp_path / "tune")) < 2 or not list((tmp_path / "tune").glob("experiment_state-*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = read_ended(tmp_path / "tune")
    starts = len(begun(tmp_path))
    found = {row["trial"]: row for row in rows(run_search(searched, tmp_path))}
    assert len(found) == 6 and before.keys() < found.keys()
    assert all(found[name]["objective"] == row["objective"] and found[name]["steps"] == row["step"] for name, row in before.items())
    again = begun(tmp_path)[starts:]
    assert not {start[3] for start in again} & {found[name]["config"]["ppo.policy.lr"] for name in before}
    best = best_row(list(found.values()))
    assert best is not None and best["config"]["ppo.policy.lr"] == max(row["config"]["ppo.policy.lr"] for row in found.values())


def test_a_population_copies_the_best_with_all_it_has_learnt(tmp_path: Path) -> None:
    # one look: at each, Tune pauses and starts again whoever finds others paused
    searched = with_values(recipe({"ppo.policy.lr": LR}, trials=4, scheduler="pbt", perturb_every=2), {"ppo.steps": 4})
    (tmp_path / TOGETHER).write_text("4")
    found = [trial_row(trial, 4) for trial in run_search(searched, tmp_path, 4)]
    assert {row["status"] for row in found} == {"finished"}
    perturbed = [json.loads(line) for line in (tmp_path / "tune" / "perturbations.jsonl").read_text().splitlines()]
    assert perturbed and all(0.01 <= record["after"]["ppo.policy.lr"] <= 1.0 for record in perturbed)
    copies = [start for start in begun(tmp_path) if start[1] > 0]
    assert {record["after"]["ppo.policy.lr"] for record in perturbed} <= {start[3] for start in copies}
    first = perturbed[0]
    copy = next(start for start in copies if start[3] == first["after"]["ppo.policy.lr"])
    donor = {step["step"]: step["score_mean"] for step in read_history(tmp_path / "tune")[first["copied"]]}
    assert copy[1] == first["step"] and copy[2] == pytest.approx(donor[first["step"]])  # what the donor had learnt when it was saved
    assert first["before"]["ppo.policy.lr"] != copy[3]
