"""Searches on real Ray Tune whose trials are a formula: marks and retries. Resumption and populations: tests/chaos/test_searches.py; real
trials: tests/e2e/test_commands.py."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from app.config.loading import with_values
from app.errors import Interrupted
from app.stages.tuning.records import read_ended, read_history, write_history
from tests.local_ray.pretend_trials import begun, recipe, rows, run_search
from tests.waiting import wait_until


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


def test_a_stopped_search_says_so_and_goes_on(tmp_path: Path) -> None:
    """With one trial at a time nothing is pending when the signal comes: Tune has only what has ended and what it has just ended itself."""
    space = {"ppo.policy.lr": {"type": "loguniform", "low": 0.01, "high": 1.0}}
    searched = recipe(space, searcher="optuna", scheduler="none", trials=3, save_every=2)

    def stop_after_the_first() -> None:
        wait_until(lambda: read_ended(tmp_path / "tune"), "the end of a trial", seconds=300)
        os.kill(os.getpid(), signal.SIGINT)

    stopping = threading.Thread(target=stop_after_the_first, daemon=True)
    stopping.start()
    with pytest.raises(Interrupted, match=r"stopped, [12] of 3 trials have ended; the same command goes on"):
        run_search(searched, tmp_path, 1)
    stopping.join()
    before = read_ended(tmp_path / "tune")
    found = {row["trial"]: row for row in rows(run_search(searched, tmp_path, 1))}
    assert [row["status"] for row in found.values()] == ["finished"] * 3
    assert before.keys() < found.keys() and len(begun(tmp_path)) <= 4
