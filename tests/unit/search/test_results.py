"""What is read of a search, the table for programs, and the table on the terminal."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from app.errors import ConfigError
from app.search.results import Search, write_trials
from jobs.tuning import show
from tests.unit.search.searches import point, row, write_search

LR, EPOCHS = "ppo.policy.lr", "ppo.epochs"


def test_trials_are_sorted_by_objective_and_those_without_one_come_last(tmp_path: Path) -> None:
    rows = [
        row("a", {LR: 1.0}, None, "failed"),
        row("b", {LR: 2.0}, 0.1),
        row("c", {LR: 3.0}, float("nan"), "non-finite"),
        row("d", {}, 0.7),
    ]
    search = Search.read(write_search(tmp_path, rows, "d"))
    assert [trial.name for trial in search.trials] == ["d", "b", "a", "c"]
    assert search.winner is not None and search.winner.name == "d"
    assert search.trials[3].objective is None
    assert search.counts == {"finished": 2, "failed": 1, "non-finite": 1}


def test_the_manifest_tells_how_keys_were_drawn(tmp_path: Path) -> None:
    space = {LR: {"type": "loguniform"}, EPOCHS: {"type": "int", "log": True}, "ppo.clip": {"type": "uniform"}}
    (tmp_path / "manifest.json").write_text(json.dumps({"config": {"tune": {"space": space, "kl_budget": 3.0}}}))
    search = Search.read(write_search(tmp_path, [row("a", {LR: 1.0}, 1.0)], "a"))
    assert search.logarithmic == {LR: True, EPOCHS: True, "ppo.clip": False}
    assert search.kl_budget == 3.0


def test_a_step_done_again_has_its_later_value(tmp_path: Path) -> None:
    history = [point("a", 1, 0.1), point("a", 2, 0.2), point("a", 2, 0.3), point("a", 3, math.inf)]
    (trial,) = Search.read(write_search(tmp_path, [row("a", {}, 1.0)], "a", history)).trials
    assert trial.curves["kl"][:2] == [(1, 0.1), (2, 0.3)]
    assert math.isnan(trial.curves["kl"][2][1])


def test_the_front_is_of_trials_that_no_other_beats_in_both(tmp_path: Path) -> None:
    found = {
        "a": (1.0, 1.0),
        "b": (2.0, 3.0),
        "c": (0.5, 2.0),
        "d": (2.0, 4.0),
        "e": (9.0, 0.5),
        "f": (3.0, 9.0),
        "g": (9.0, 0.1),
        "h": (9.0, 0.1),
    }
    status = {"e": "diverged", "f": "over KL budget", "g": "failed", "h": "refused"}
    rows = [row(name, {}, score, status.get(name, "finished"), kl=kl) for name, (score, kl) in found.items()]
    front = Search.read(write_search(tmp_path, rows, "b")).front()
    assert [trial.name for trial in front] == ["a", "b", "f"]


def test_the_table_of_trials_has_a_typed_column_for_every_key(tmp_path: Path) -> None:
    rows = [
        row("a", {LR: 1e-4, EPOCHS: 1, "x.mixed": "p", "x.flag": True}, 0.5),
        row("b", {LR: 1, EPOCHS: 2, "x.mixed": 3}, None, "failed", error="lost"),
    ]
    table = pq.read_table(write_trials(Search.read(write_search(tmp_path, rows, "a"))))
    assert table.column("trial").to_pylist() == ["a", "b"]
    assert table.column("objective").to_pylist() == [0.5, None]
    assert table.column(LR).to_pylist() == [1e-4, 1.0]
    assert table.column(EPOCHS).to_pylist() == [1, 2]
    assert table.column("x.mixed").to_pylist() == ["p", "3"]
    assert table.column("x.flag").to_pylist() == [True, None]
    assert table.column("error").to_pylist() == ["", "lost"]


@pytest.mark.parametrize(("began", "reason"), [(False, "it holds no search"), (True, "has not ended")])
def test_a_folder_without_a_finished_search(tmp_path: Path, began: bool, reason: str) -> None:
    if began:
        (tmp_path / "tune").mkdir()
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(ConfigError, match=reason):
        Search.read(tmp_path)


def test_the_terminal_shows_how_each_trial_ended(tmp_path: Path) -> None:
    rows = [
        row("t_best", {LR: 1.25e-4, "ppo.algorithm": "ppo"}, 0.5),
        row("t_slow", {LR: 5e-4, "ppo.algorithm": "grpo"}, 0.1, "stopped early", steps=2),
        row("t_lost", {LR: 2e-4}, None, "failed", steps=0, score=None, kl=None, error="ActorDiedError: [worker] is gone"),
        row("t_odd", {LR: 3e-4}, None, "refused", steps=0, score=None, kl=None, why="ppo.batch_size = 64 is no multiple"),
    ]
    out = io.StringIO()
    show(Search.read(write_search(tmp_path, rows, "t_best")), 4, Console(file=out, width=160))
    lines = out.getvalue().splitlines()
    told = [next(line for line in lines if name in line) for name in ("t_best", "t_slow", "t_lost")]
    assert [lines.index(line) for line in told] == sorted(lines.index(line) for line in told)
    for line, parts in zip(
        told, [("best, finished", "0.500", "4/4", "0.000125", "ppo"), ("stopped early", "2/4"), ("failed", "0/4")], strict=True
    ):
        assert all(part in line for part in parts)
    assert "t_lost: ActorDiedError: [worker] is gone" in lines
    assert "t_odd: ppo.batch_size = 64 is no multiple" in lines
    assert "best: --ppo.policy.lr=0.000125 --ppo.algorithm=ppo" in lines
