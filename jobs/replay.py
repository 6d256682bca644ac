"""`corral replay`: a PPO step computed again from its recorded rollouts."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from app.errors import ConfigError
from jobs.command import Tool, console

if TYPE_CHECKING:
    from app.stages.replay import Comparison


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which step of which run."""
    parser.add_argument("run", metavar="RUN", help="run folder, such as runs/demo")
    parser.add_argument("step", metavar="STEP", type=int, help="PPO step, counted from 1")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Compare and print. Raises ReplayError where a metric differs."""
    if overrides:
        raise ConfigError(f"corral replay has no option {overrides[0]}: `corral replay --help` lists them")
    from app.durable import without_non_finite
    from app.stages.replay import replay, require_equal

    comparisons = replay(Path(arguments.run).expanduser(), arguments.step)

    def as_dict(row: Comparison) -> dict[str, object]:
        return {"metric": row.metric, "logged": row.logged, "replayed": row.replayed, "equal": row.equal}

    if arguments.json:
        result = {"step": arguments.step, "equal": all(row.equal for row in comparisons), "metrics": [as_dict(row) for row in comparisons]}
        sys.stdout.write(json.dumps(without_non_finite(result)) + "\n")
    else:
        show(comparisons)
    require_equal(comparisons, arguments.step)
    return 0


def show(comparisons: Sequence[Comparison]) -> None:
    """The comparison as a table."""
    from rich.table import Table

    table = Table("metric", "logged", "replayed", "", show_edge=False)
    for row in comparisons:
        table.add_row(row.metric, "" if row.logged is None else f"{row.logged:.8g}", f"{row.replayed:.8g}", "" if row.equal else "differs")
    console().print(table)


TOOL = Tool(
    purpose="compute a PPO step again from its recorded rollouts and compare it with the log",
    details=(
        "Reads RUN/ppo/rollouts/step-*.parquet (the last ppo.keep_rollouts steps) and RUN/metrics.jsonl. Computes rewards, advantages,\n"
        "returns and losses again, with scores, log-probs and values as they were recorded. Exit code 1 where a metric differs.\n\n"
        "example:\n  corral replay runs/demo 20"
    ),
    add_arguments=add_arguments,
    run=run,
)
