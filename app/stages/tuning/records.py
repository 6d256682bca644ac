"""What a search leaves in `DIR/tune`, written as it happens so that a search that is killed goes on from it.

`history.jsonl`, in the end `history.parquet`: a row per trial and step; `ended.jsonl`: a row per trial that has come to its end;
`perturbations.jsonl`: what pbt and pb2 have changed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from ray import tune

from app.config.recipe import Recipe
from app.durable import without_non_finite
from app.errors import first_line
from app.run_layout import SEARCH
from app.search.records import CURVES, FAILED, FINISHED, HISTORY, STOPPED_EARLY, finite
from app.tracking import RunTracker, drop_partial_line

VALUES = "values"
"""Key of a trial's Tune config that holds its recipe keys and their values."""
STEPS, ENDED, PERTURBATIONS = "history.jsonl", "ended.jsonl", "perturbations.jsonl"
RESULT = (
    *("step", "target", "target_score", "target_kl", "objective", "score", "mean_kl"),
    *("score_mean", "kl", "entropy", "response_length", "status", "why"),
)
"""Keys of a trial's reports that are kept."""


def trial_name(trial_id: str) -> str:
    """Folder and row name of a trial."""
    return f"trial_{trial_id}"


class SearchRecords(tune.Callback):
    """Writes the records, in the driver, and tells how each trial ended."""

    def __init__(self, folder: Path, tracker: RunTracker, recipe: Recipe, trials: int) -> None:
        self._folder, self._tracker, self._recipe, self._trials = folder, tracker, recipe, trials
        folder.mkdir(exist_ok=True)
        for name in (STEPS, ENDED, PERTURBATIONS):
            drop_partial_line(folder / name)
        self._ended = set(read_ended(folder))

    @property
    def ended(self) -> int:
        """Trials that have come to an end of their own, failed ones among them."""
        return len(self._ended)

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
        """A trial made a step."""
        self._append(STEPS, {"trial": trial_name(trial.trial_id), **kept(result)})

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial lost a process."""
        step = (trial.last_result or {}).get("step", 0)
        self._tracker.note(f"tune: {trial_name(trial.trial_id)} failed after step {step} and goes on from its last checkpoint")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial came to its last step, was marked, or was stopped by the scheduler."""
        row = trial_row(trial, self._recipe.ppo.steps)
        if row["trial"] in self._ended:  # ended already, before the search was killed
            return
        self._append(ENDED, {"trial": row["trial"], **kept(trial.last_result)})
        shown = {"objective": row["objective"], "score_mean": row["score"], "kl": row["kl"]}
        self._tracker.log(SEARCH, len(self._ended) + 1, {name: math.nan if value is None else value for name, value in shown.items()})
        objective = "no objective" if row["objective"] is None else f"objective {row['objective']:.3f}"
        why = f": {row['why']}" if row["why"] else ""
        self._note(row["trial"], f"{row['status']} after {row['steps']} of {self._recipe.ppo.steps} steps, {objective}{why}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial failed for good; the search goes on without it."""
        self._note(trial_name(trial.trial_id), f"failed: {_error_of(trial)}")

    def perturbed(self, record: Mapping[str, Any]) -> None:
        """A trial goes on as a changed copy of another. record: `trial`, `copied`, `step`, `before`, `after`."""
        self._append(PERTURBATIONS, record)
        changed = [f"{key} {record['before'].get(key)} -> {value}" for key, value in record["after"].items()]
        self._tracker.note(f"tune: {record['trial']} copies {record['copied']} at step {record['step']}: {', '.join(changed)}")

    def _note(self, name: str, how: str) -> None:
        self._ended.add(name)
        self._tracker.note(f"tune: trial {len(self._ended)} of {self._trials}, {name}: {how}")

    def _append(self, file: str, row: Mapping[str, Any]) -> None:
        with (self._folder / file).open("a", encoding="utf-8") as out:
            out.write(json.dumps(without_non_finite(row), allow_nan=False) + "\n")


def kept(result: Mapping[str, Any]) -> dict[str, Any]:
    return {name: result[name] for name in RESULT if name in result}


def read_ended(folder: Path) -> dict[str, dict[str, Any]]:
    """Trial -> its last report, of those that have ended."""
    return {row.pop("trial"): row for row in _rows(folder / ENDED)}


def read_history(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Trial -> its reports by step; of a step that was done again after a failure, the later one."""
    steps: dict[str, dict[int, dict[str, Any]]] = {}
    for row in _rows(folder / STEPS):
        steps.setdefault(row.pop("trial"), {})[row["step"]] = row
    return {trial: [of_trial[step] for step in sorted(of_trial)] for trial, of_trial in steps.items()}


def write_history(folder: Path) -> Path:
    """`history.parquet` with the columns trial, step and `CURVES`; null where a value was not finite."""
    rows = [{"trial": trial, **row} for trial, of_trial in read_history(folder).items() for row in of_trial]
    schema = pa.schema([("trial", pa.string()), ("step", pa.int64()), *((name, pa.float64()) for name in CURVES)])
    path = folder / HISTORY
    pq.write_table(pa.Table.from_pylist([{name: row.get(name) for name in schema.names} for row in rows], schema), path)
    return path


def trial_row(trial: Any, steps: int) -> dict[str, Any]:
    """One line of the table, of a Tune trial that has ended: its configuration, how far it came and how it ended, `why` where its
    configuration was to blame, `error` where it failed; objective, score and KL are the last ones, null where there is none."""
    result = trial.last_result or {}
    done, failed = int(result.get("step", 0)), trial.status == "ERROR"
    status = FAILED if failed else result.get("status") or (FINISHED if done >= steps else STOPPED_EARLY)
    return {
        "trial": trial_name(trial.trial_id),
        "config": dict(trial.config[VALUES]),
        "steps": done,
        "status": status,
        "why": result.get("why"),
        "objective": finite(result.get("objective")),
        "score": finite(result.get("score")),
        "kl": finite(result.get("mean_kl")),
        "error": _error_of(trial) if failed else None,
    }


def _error_of(trial: Any) -> str:
    """The last line of what the trial raised: Ray's own lines stand before it."""
    error = trial.get_error()
    lines = str(error).strip().splitlines() if error is not None else []
    return lines[-1] if lines else first_line(error or RuntimeError("no reason known"))


def _rows(path: Path) -> Sequence[dict[str, Any]]:
    if not path.is_file():
        return []
    complete = path.read_text(encoding="utf-8").rpartition("\n")[0]  # a trial may read while the driver writes
    return [json.loads(line) for line in complete.splitlines()]
