"""What `app.planning.simulation` says of a PPO run, beside what the run measured.

Phases are taken from runs at ppo.max_lag = 0, and steps of other runs are predicted: other lags, other numbers of engines and learners.
On a CPU the devices of a role are its processes x threads, and engines and learner share the cores.

    .venv/bin/python bench/loop_simulation.py --measured runs/lag-0 --predict runs/lag-1 --json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # a script's own folder leads sys.path; the packages lie beside it

from app.planning.simulation import LoopWork, Phases, step_seconds  # noqa: E402


@dataclass(frozen=True)
class Run:
    """A run's steps and the devices of its engines and learners."""

    name: str
    steps: Sequence[Mapping[str, float]]
    engines: int
    learners: int
    max_lag: int

    @classmethod
    def read(cls, folder: Path) -> Run:
        """From `metrics.jsonl` and `manifest.json`."""
        config = json.loads((folder / "manifest.json").read_text())["config"]
        events = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        steps = [event["metrics"] for event in events if event["stage"] == "ppo" and "seconds/rollout" in event["metrics"]]
        return cls(
            folder.name,
            steps,
            devices(config["rollout"]["engines"]),
            devices(config["ppo"]["workers"]),
            config["ppo"]["max_lag"],
        )

    @property
    def seconds(self) -> float:
        """Mean of a step, without the first, in which caches are cold, and the last ones, which the engines have nothing to do beside."""
        return statistics.mean(step["seconds"] for step in self.steps[1 : len(self.steps) - self.max_lag])


def devices(workers: Mapping[str, Any]) -> int:
    """GPUs, or threads, of all processes of a role."""
    return int(workers["count"] * (workers["gpus"] or workers["threads"]))


def compare(measured: Sequence[Run], predicted: Sequence[Run], cores: int) -> list[dict[str, Any]]:
    """A row per predicted run."""
    work = LoopWork.of({(run.engines, run.learners): Phases.measured(run.steps) for run in measured})
    rows = []
    for run in predicted:
        rate = min(1.0, cores / (run.engines + run.learners))
        expected = step_seconds(work.on(run.engines, run.learners), max_lag=run.max_lag, side_by_side=rate)
        size = {"engines": run.engines, "learners": run.learners, "max_lag": run.max_lag}
        rows.append({"run": run.name, **size, "expected": expected, "measured": run.seconds, "ratio": expected / run.seconds})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", type=Path, nargs="+", required=True, metavar="RUN", help="run folders at max_lag = 0")
    parser.add_argument("--predict", type=Path, nargs="+", required=True, metavar="RUN", help="run folders to predict")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)), help="that engines and learner share")
    parser.add_argument("--json", action="store_true", help="also print one JSON object per run")
    arguments = parser.parse_args()
    measured = [Run.read(folder) for folder in arguments.measured]
    lagged = [run.name for run in measured if run.max_lag]
    if lagged:
        parser.error(f"--measured: {', '.join(lagged)} ran with a lag, where phases overlap")
    for run in measured:
        sys.stderr.write(f"{run.name}: {run.engines} + {run.learners} devices, {Phases.measured(run.steps)}\n")
    for row in compare(measured, [Run.read(folder) for folder in arguments.predict], arguments.cores):
        sys.stderr.write(
            f"{row['run']:16s} {row['engines']} + {row['learners']} devices, lag {row['max_lag']}: expected {row['expected']:.3f} s, "
            f"measured {row['measured']:.3f} s, ratio {row['ratio']:.2f}\n"
        )
        if arguments.json:
            sys.stdout.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
