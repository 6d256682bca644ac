"""A long PPO run under observation: memory, open files and threads of each of its processes, and Ray's object store.

The run has a Ray of its own and as many steps as fit into the time; then it is asked to stop. For each process the table shows what
it had after the first third (until then it may still grow into its work) and at the end, and the slope between, by least squares.

    python -m bench.soak --models runs/demo --minutes 30
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import ray
from ray._private.internal_api import memory_summary

from app.workers.memory import process_tree, raylet_pids
from bench.chaos import RUN_SECONDS, logged_steps

OPTIONS = ("--ppo.steps=1000000", "--ppo.batch_size=32", "--ppo.save_every=20", "--evaluation.prompts=16", "--run.deadline_seconds=300")
WARM_UP = 1 / 3
"""Share of the time that does not count."""
GROWTH, GROWTH_MIB, MORE_FILES = 0.05, 32, 8
"""A process grows where the least of the last third is above the most of the second by so much, relative and absolute."""


@dataclass(frozen=True)
class Sample:
    """Of one process at one moment (seconds). private_mib: of the RSS without pages of files and of the object store, which every
    process that has read an object has in common with the others."""

    moment: float
    rss_mib: float
    private_mib: float
    files: int
    threads: int


def sample(roots: set[int]) -> dict[tuple[str, int], Sample]:
    """(title, pid) -> sample of every process in the trees of `roots`."""
    found = {}
    for pid in process_tree(roots):
        try:
            process = psutil.Process(pid)
            with process.oneshot():
                memory = process.memory_info()
                found[title_of(process), pid] = Sample(
                    time.monotonic(),
                    memory.rss / 2**20,
                    (memory.rss - memory.shared) / 2**20,
                    process.num_fds(),
                    process.num_threads(),
                )
        except psutil.Error:
            continue  # it has just ended
    return found


def title_of(process: psutil.Process) -> str:
    """What the process is, whatever method it is in."""
    words = process.cmdline()
    if words and words[0].startswith("ray::"):
        return re.split(r"[.(#]", words[0].removeprefix("ray::"))[0] or words[0]
    return "driver" if "jobs" in words[1:3] else process.name()


def object_store_mib(address: str) -> float:
    """In use, over all nodes."""
    text = memory_summary(address, stats_only=True)
    return float(re.search(r"Plasma memory usage (\d+) MiB", text)[1])  # type: ignore[index]


def slope_per_hour(moments: Sequence[float], values: Sequence[float]) -> float:
    """Least squares; 0 for a single moment."""
    return float(np.polyfit(moments, values, 1)[0]) * 3600 if len(moments) > 1 else 0.0


def grows(values: Sequence[float], *, relative: float, absolute: float) -> bool:
    """Whether all of the last third lie above all of the second."""
    third = len(values) // 3
    if not third:
        return False
    before, after = max(values[third : 2 * third]), min(values[2 * third :])
    return after > before * (1 + relative) and after > before + absolute


def observe(
    process: subprocess.Popen[bytes], address: str, seconds: float, interval: float
) -> tuple[dict[tuple[str, int], list[Sample]], list[float]]:
    """Samples of the run's processes, and of the object store (MiB), until the time is over. Fails when the run ends first."""
    history: dict[tuple[str, int], list[Sample]] = defaultdict(list)
    store: list[float] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(interval)
        if process.poll() is not None:
            raise SystemExit(f"the run ended with exit code {process.returncode}")
        for key, one in sample({process.pid, *raylet_pids()}).items():
            history[key].append(one)
        store.append(object_store_mib(address))
    return history, store


def table(history: dict[tuple[str, int], list[Sample]]) -> tuple[list[str], list[str]]:
    """Markdown rows for the processes that lived to the end and for most of the time, and what grows among them."""
    longest = max(map(len, history.values()))
    rows, growing = [], []
    for (title, _), samples in sorted(history.items()):
        if len(samples) < 0.9 * longest:
            continue
        warm = samples[int(len(samples) * WARM_UP) :]
        private, files = [one.private_mib for one in samples], [float(one.files) for one in samples]
        slope = slope_per_hour([one.moment for one in warm], [one.private_mib for one in warm])
        first, last = warm[0], warm[-1]
        rows.append(
            f"| {title} | {first.rss_mib:.0f} | {last.rss_mib:.0f} | {first.private_mib:.0f} | {last.private_mib:.0f} | {slope:+.0f} "
            f"| {first.files} | {last.files} | {first.threads} | {last.threads} |"
        )
        if grows(private, relative=GROWTH, absolute=GROWTH_MIB):
            growing.append(f"memory of {title}")
        if grows(files, relative=0, absolute=MORE_FILES):
            growing.append(f"open files of {title}")
    return rows, growing


def main() -> None:
    """Prints the table; exit code 1 where something grows, or the run does not stop as asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="run folder with sft/model and rm/model, such as runs/demo")
    parser.add_argument("--minutes", type=float, default=30.0, help="from the first step on")
    parser.add_argument("--interval", type=float, default=5.0, help="seconds between samples")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak-")) / "run"
    models: Path = arguments.models
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")  # its default fills for hundreds of steps, as if something leaked
    address = ray.init(
        address="local", num_cpus=4, object_store_memory=512 * 2**20, logging_level="ERROR", log_to_driver=False
    ).address_info["gcs_address"]
    given = [f"--model.path={models / 'sft/model'}", f"--reward.path={models / 'rm/model'}", f"--run.dir={folder}"]
    command = [sys.executable, "-m", "jobs", "ppo", "jobs/recipes/tiny/ppo.toml", *given, *OPTIONS]
    with folder.with_suffix(".log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"RAY_ADDRESS": address})
    while not (folder / "metrics.jsonl").is_file() or not logged_steps(folder):
        if process.poll() is not None:
            raise SystemExit(f"the run ended before its first step; see {folder.with_suffix('.log')}")
        time.sleep(0.5)
    history, store = observe(process, address, 60 * arguments.minutes, arguments.interval)
    steps = logged_steps(folder)
    process.send_signal(signal.SIGTERM)
    code = process.wait(RUN_SECONDS)
    rows, growing = table(history)
    if grows(store, relative=GROWTH, absolute=GROWTH_MIB):
        growing.append("the object store")
    print(
        f"{arguments.minutes:g} minutes, {steps} steps, a sample every {arguments.interval:g} s; stopped by SIGTERM with exit code {code}\n"
    )
    print("| process | RSS, MiB | at the end | private, MiB | at the end | MiB per hour | open files | at the end | threads | at the end |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    print("\n".join(rows))
    print(f"\nObject store in use: {store[int(len(store) * WARM_UP)]:.0f} MiB, at the end {store[-1]:.0f}, at most {max(store):.0f}.")
    print(f"What grows: {', '.join(growing) or 'nothing'}.")
    raise SystemExit(1 if growing or code != 130 else 0)


if __name__ == "__main__":
    main()
