"""Searches on real Ray Tune whose trials are a formula, killed as a whole, and populations."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from app.config.loading import with_values
from app.stages.tuning.records import read_ended, read_history, trial_row
from app.stages.tuning.verdicts import best_row
from tests.local_ray.conftest import cluster  # noqa: F401
from tests.local_ray.pretend_trials import TOGETHER, begun, recipe, rows, run_search
from tests.waiting import wait_until

LR = {"type": "loguniform", "low": 0.01, "high": 1.0}


def test_a_killed_search_repeats_no_finished_trial(tmp_path: Path) -> None:
    searched = recipe({"ppo.policy.lr": LR}, searcher="optuna", trials=6, concurrent=2, scheduler="asha", save_every=1, grace_steps=2)
    (tmp_path / "recipe.json").write_text(searched.model_dump_json())
    env = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    command = [sys.executable, "-m", "tests.local_ray.pretend_trials", str(tmp_path), str(tmp_path / "recipe.json")]
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)
    search = tmp_path / "tune"
    wait_until(lambda: len(read_ended(search)) >= 2 and list(search.glob("experiment_state-*")), "two ends of trials", process=process)
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


@pytest.mark.parametrize(("scheduler", "steps"), [("pbt", 4), ("pb2", 6)])  # pb2 needs two looks to see what a value gains
def test_a_population_copies_the_best_with_all_it_has_learnt(tmp_path: Path, scheduler: str, steps: int) -> None:
    if scheduler == "pb2":
        pytest.importorskip("sklearn")
    # as few looks as can be: at each, Tune pauses and starts again whoever finds others paused
    space = recipe({"ppo.policy.lr": LR}, trials=4, scheduler=scheduler, perturb_every=2)
    (tmp_path / TOGETHER).write_text("4")
    found = [trial_row(trial, steps) for trial in run_search(with_values(space, {"ppo.steps": steps}), tmp_path, 4)]
    assert {row["status"] for row in found} == {"finished"}
    records = [json.loads(line) for line in (tmp_path / "tune" / "perturbations.jsonl").read_text().splitlines()]
    changed = [record for record in records if record["before"] != record["after"]]
    assert changed and all(0.01 <= record["after"]["ppo.policy.lr"] <= 1.0 for record in records)
    copies = [start for start in begun(tmp_path) if start[1] > 0]
    assert {record["after"]["ppo.policy.lr"] for record in records} <= {start[3] for start in copies}
    first = changed[0]
    copy = next(start for start in copies if start[3] == first["after"]["ppo.policy.lr"])
    donor = {step["step"]: step["score_mean"] for step in read_history(tmp_path / "tune")[first["copied"]]}
    assert copy[1] == first["step"] and copy[2] == pytest.approx(donor[first["step"]])  # what the donor had learnt when it was saved
