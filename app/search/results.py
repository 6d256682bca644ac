"""What a hyperparameter search found, as `summary.json` and `tune/history.parquet` of its run folder have it."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from app.config.loading import toml_value
from app.durable import read_json
from app.errors import ConfigError
from app.run_layout import MANIFEST, SEARCH, SUMMARY_FILE
from app.search.records import CURVES, HISTORY, MEASURED, finite

TRIALS = "trials.parquet"

Points = Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Trial:
    """One configuration that was tried. objective, score, kl: the last ones, None where there is none or it is not finite;
    config: searched key -> value, without keys whose condition did not hold; curves: name in `CURVES` -> (step, value), NaN
    where a value was not finite."""

    name: str
    config: Mapping[str, Any]
    status: str
    steps: int = 0
    objective: float | None = None
    score: float | None = None
    kl: float | None = None
    why: str = ""
    error: str = ""
    curves: Mapping[str, Points] = field(default_factory=dict)

    @classmethod
    def of(cls, row: Mapping[str, Any], curves: Mapping[str, Points]) -> Trial:
        """The trial of a row of `tune.trials`."""
        return cls(
            row["trial"],
            row["config"],
            row["status"],
            int(row.get("steps") or 0),
            finite(row.get("objective")),
            finite(row.get("score")),
            finite(row.get("kl")),
            row.get("why") or "",
            row.get("error") or "",
            curves,
        )


@dataclass(frozen=True)
class Search:
    """trials: highest objective first, those without one last; best: name of the winner, None where no trial can be it. As far as
    the run's manifest tells: whether a key was drawn by its logarithm, and `tune.kl_budget`."""

    path: Path
    trials: tuple[Trial, ...]
    best: str | None
    logarithmic: Mapping[str, bool] = field(default_factory=dict)
    kl_budget: float | None = None

    @classmethod
    def read(cls, path: Path) -> Search:
        """The search in a run folder. Raises ConfigError where it holds none that has ended."""
        file = path / SUMMARY_FILE
        found = read_json(file).get("tune") if file.is_file() else None
        if found is None:
            began = (path / SEARCH).is_dir()
            reason = "its search has not ended: the same `corral tune` goes on with it" if began else "it holds no search"
            raise ConfigError(f"{path}: {reason}{'' if began else ': give the run.dir of a finished `corral tune`'}")
        histories = read_histories(path / SEARCH / HISTORY)
        trials = [Trial.of(row, histories.get(row["trial"], {})) for row in found["trials"]]
        best = found.get("best") or {}
        manifest = read_json(path / MANIFEST) if (path / MANIFEST).is_file() else {}
        config = manifest.get("config", {}).get("tune", {})
        logarithmic = {key: domain["type"] == "loguniform" or domain.get("log", False) for key, domain in config.get("space", {}).items()}
        trials.sort(key=lambda trial: -_or_worst(trial.objective))
        return cls(path, tuple(trials), best.get("trial"), logarithmic, config.get("kl_budget"))

    @property
    def keys(self) -> list[str]:
        """The keys that were searched, in the order in which they first occur."""
        return list(dict.fromkeys(key for trial in self.trials for key in trial.config))

    @property
    def winner(self) -> Trial | None:
        return next((trial for trial in self.trials if trial.name == self.best), None)

    @property
    def counts(self) -> dict[str, int]:
        """How many trials ended how, the most frequent end first."""
        ends = [trial.status for trial in self.trials]
        return {end: ends.count(end) for end in sorted(dict.fromkeys(ends), key=ends.count, reverse=True)}

    def column(self, key: str) -> list[Any]:
        """The values of a key in the order of `trials`; None where a trial does not have it."""
        return [trial.config.get(key) for trial in self.trials]

    def front(self) -> list[Trial]:
        """Pareto front, lowest KL first: no other trial that held has a score as high at a KL as low."""
        points = [t for t in self.trials if t.score is not None and t.kl is not None and t.status in MEASURED]
        front: list[Trial] = []
        for trial in sorted(points, key=lambda t: (_or_worst(t.kl), -_or_worst(t.score))):
            if not front or _or_worst(trial.score) > _or_worst(front[-1].score):
                front.append(trial)
        return front


def as_options(config: Mapping[str, Any]) -> list[str]:
    """A configuration as options of a command, quoted for a shell.

    >>> as_options({"ppo.policy.lr": 1e-05, "ppo.reuse_forward": True, "ppo.algorithm": "grpo"})
    ['--ppo.policy.lr=1e-05', '--ppo.reuse_forward=true', '--ppo.algorithm=grpo']
    """
    texts = {key: value if isinstance(value, str) else toml_value(value) for key, value in config.items()}
    return [shlex.quote(f"--{key}={text}") for key, text in texts.items()]


def write_trials(search: Search) -> Path:
    """`tune/trials.parquet`: a row per trial, a column per searched key."""
    plain = ("status", "steps", "objective", "score", "kl", "why", "error")
    table = pa.table(
        {"trial": [trial.name for trial in search.trials]}
        | {name: column([getattr(trial, name) for trial in search.trials]) for name in plain}
        | {key: column(search.column(key)) for key in search.keys}
    )
    path = search.path / SEARCH / TRIALS
    path.parent.mkdir(exist_ok=True)
    pq.write_table(table, path)
    return path


def column(values: Sequence[Any]) -> pa.Array:
    """An Arrow column of one type; values of several types become the text that JSON has for them."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float}:
        return pa.array(values, pa.int64() if kinds == {int} else pa.float64())
    if kinds in ({str}, {bool}):
        return pa.array(values)
    return pa.array([None if value is None else value if isinstance(value, str) else json.dumps(value) for value in values], pa.string())


def read_histories(path: Path) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Trial -> name in `CURVES` -> (step, value) by step. A step that was done again after a retry has its later value."""
    if not path.is_file():
        return {}
    rows: dict[str, dict[int, Mapping[str, Any]]] = {}
    for row in pq.read_table(path).to_pylist():
        rows.setdefault(row["trial"], {})[int(row["step"])] = row
    return {
        trial: {name: [(step, as_float(row.get(name))) for step, row in sorted(steps.items())] for name in CURVES}
        for trial, steps in rows.items()
    }


def as_float(value: Any) -> float:
    """NaN for None and infinities."""
    number = finite(value)
    return math.nan if number is None else number


def _or_worst(value: float | None) -> float:
    return -math.inf if value is None else value


def is_numeric(values: Iterable[Any]) -> bool:
    """Whether a key's values, None aside, are all numbers; true and false are none."""
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values if value is not None)
