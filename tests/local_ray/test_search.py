"""Searches on real Ray Tune whose trials are a formula: marks and retries. Resumption and populations: tests/chaos/test_searches.py; real
trials: tests/e2e/test_commands.py."""

from __future__ import annotations

from pathlib import Path

from app.config.loading import with_values
from app.stages.tuning.records import read_history, write_history
from tests.local_ray.pretend_trials import begun, recipe, rows, run_search


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
    (stacks,) = (tmp_path / "tune" / found[4]["trial"] / "logs").glob("stacks-a-wait-*.txt")  # of the trial, not of the search
    assert "==== the waiting process" in stacks.read_text()
