"""A table of what several pipeline runs learned: `python -m bench.learning RUN_FOLDER ...` prints Markdown."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HEADING = """# The embedded task over several seeds

`make learn`: the whole pipeline of `jobs/recipes/tiny/pipeline.toml`, once per seed.
Gold is the score that no training sees, on 256 held-out prompts; intervals are 95 % bootstrap intervals; lengths are tokens.

"""
COLUMNS = {
    "RM pair accuracy": "rm.pair_accuracy",
    "length baseline": "rm.length_baseline",
    "gold before": "ppo.gold_before",
    "gold after": "ppo.gold_after",
    "gold gain": "ppo.gold_gain",
    "win rate": "ppo.win_rate",
    "KL": "ppo.kl",
    "length before": "ppo.length_before",
    "length after": "ppo.length_after",
    "distinct after": "ppo.distinct_after",
}


def table(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """One row per run; intervals as mean [low, high]."""
    lines = [f"| run | {' | '.join(COLUMNS)} |", f"|---{'|---' * len(COLUMNS)}|"]
    for name, summary in summaries.items():
        lines.append(f"| {name} | {' | '.join(_cell(summary, key) for key in COLUMNS.values())} |")
    return "\n".join(lines) + "\n"


def _cell(summary: Mapping[str, Any], key: str) -> str:
    """The value of a dotted key of summary.json, whose sections are nested."""
    value: Any = summary
    for part in key.split("."):
        value = value[part]
    if isinstance(value, Mapping):
        return f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
    return f"{value:.3f}"


def main(folders: Sequence[str]) -> None:
    sys.stdout.write(HEADING + table({Path(folder).name: json.loads((Path(folder) / "summary.json").read_text()) for folder in folders}))


if __name__ == "__main__":
    main(sys.argv[1:])
