"""Tables of what runs of several algorithms and seeds learned: `python -m bench.learning ALGORITHM-SEED ...` prints Markdown.

Each argument is a run folder whose name ends in the algorithm and the seed, such as runs/learn/grpo-3.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HEADING = """# The embedded task: four algorithms, several seeds

`make learn`: for each seed the whole pipeline of `jobs/recipes/tiny/pipeline.toml` (PPO), then `jobs/recipes/tiny/ppo-grpo.toml` with
each of the other algorithms on the same SFT and reward model. Gold is the score that no training sees, on 256 held-out prompts; gain is
after minus before, on the same prompts. Lengths are tokens, KL nats per answer.

## Over the seeds

The standard error is that of the mean over the seeds (of five, 2.78 standard errors to both sides are a 95 % interval). The last column
is the lowest end of the seeds' own bootstrap intervals.

"""
RUNS = """
## Every run

95 % bootstrap intervals over the prompts.

"""
COLUMNS = {
    "gold before": "ppo.gold_before",
    "gold after": "ppo.gold_after",
    "gold gain": "ppo.gold_gain",
    "win rate": "ppo.win_rate",
    "KL": "ppo.kl",
    "length before": "ppo.length_before",
    "length after": "ppo.length_after",
    "distinct after": "ppo.distinct_after",
}


def by_run(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """One row per run; intervals as mean [low, high]."""
    return _table(
        ["run", *COLUMNS], [[name, *(_cell(_value(summary, key)) for key in COLUMNS.values())] for name, summary in summaries.items()]
    )


def by_algorithm(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """One row per algorithm: the gold gain over its seeds."""
    gains: dict[str, list[Mapping[str, float]]] = defaultdict(list)
    for name, summary in summaries.items():
        gains[name.rpartition("-")[0]].append(_value(summary, "ppo.gold_gain"))
    rows = []
    for algorithm, found in gains.items():
        means = [gain["mean"] for gain in found]
        error = statistics.stdev(means) / len(means) ** 0.5 if len(means) > 1 else float("nan")
        rows.append([algorithm, str(len(means)), *map(_cell, (statistics.fmean(means), error, min(gain["low"] for gain in found)))])
    return _table(["algorithm", "seeds", "gold gain", "standard error", "lowest end of a seed"], rows)


def _value(summary: Mapping[str, Any], key: str) -> Any:
    """Of a dotted key of summary.json, whose sections are nested."""
    value: Any = summary
    for part in key.split("."):
        value = value[part]
    return value


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
    return f"{value:.3f}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [heads, ["---"] * len(heads), *rows]) + "\n"


def main(folders: Sequence[str]) -> None:
    summaries = {Path(folder).name: json.loads((Path(folder) / "summary.json").read_text()) for folder in folders}
    sys.stdout.write(HEADING + by_algorithm(summaries) + RUNS + by_run(summaries))


if __name__ == "__main__":
    main(sys.argv[1:])
