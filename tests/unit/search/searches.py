"""Run folders that hold a search, for tests."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def row(name: str, config: Mapping[str, Any], objective: float | None, status: str = "finished", **more: Any) -> dict[str, Any]:
    """A row of `tune.trials`; its score is the objective and its KL 1 unless `more` says otherwise."""
    found = {"trial": name, "config": dict(config), "steps": 4, "objective": objective, "score": objective, "kl": 1.0}
    return {**found, "status": status, "why": None, "error": None, **more}


def write_search(
    folder: Path, rows: Sequence[Mapping[str, Any]], best: str | None = None, history: Sequence[Mapping[str, Any]] = ()
) -> Path:
    """`summary.json` and `tune/history.parquet` of a search."""
    (folder / "tune").mkdir(parents=True, exist_ok=True)
    winner = next((one for one in rows if one["trial"] == best), None)
    results = {"trials": list(rows), "best": winner, "best_config": winner and winner["config"]}
    (folder / "summary.json").write_text(json.dumps({"tune": results}))
    if history:
        pq.write_table(pa.Table.from_pylist(list(history)), folder / "tune" / "history.parquet")
    return folder


def point(trial: str, step: int, value: float) -> dict[str, Any]:
    """A row of the history."""
    return {"trial": trial, "step": step} | dict.fromkeys(("objective", "score_mean", "kl", "entropy", "response_length"), value)
