"""Kills processes of PPO runs at random moments, and compares what each run leaves with an undisturbed one.

Runs are exact (run.determinism = "exact"), so every run has to end with the same policy, bit for bit, and the same metrics of every
step: by itself where a rollout engine, a scoring replica or a learner rank is lost, by the same command typed again where its driver
is killed, or asked to stop.

    python -m bench.chaos --models runs/demo --rounds 10               # one of them a run
    python -m bench.chaos --models runs/demo --rounds 2 --together 5   # one after another in the same run
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class Kind:
    """A disturbance. title: of the processes that may be hit, the driver where it is empty; typed: how often the command is, then."""

    title: str
    typed: int
    signal: signal.Signals = signal.SIGKILL


KINDS = {
    "learner rank": Kind("ray::LearnerWorker", 1),
    "rollout engine": Kind("ray::RolloutEngine", 1),
    "scoring replica": Kind("ray::ServeReplica", 1),
    "driver": Kind("", 2),
    "request to stop": Kind("", 2, signal.SIGTERM),
}
OPTIONS = (
    "--run.determinism=exact", "--ppo.steps=10", "--ppo.save_every=2", "--ppo.batch_size=32", "--evaluation.prompts=16",
    "--run.deadline_seconds=300",
)  # fmt: skip
RUN_SECONDS = 900
LOOP_BEGINS = "  started"
"""What the command prints when its loop begins or goes on, also with a new learner."""


def start(models: Path, folder: Path) -> subprocess.Popen[bytes]:
    """The run in the background; its output is in `folder`.log."""
    recipe = "jobs/recipes/tiny/ppo.toml"
    given = [f"--model.path={models / 'sft/model'}", f"--reward.path={models / 'rm/model'}", f"--run.dir={folder}"]
    with folder.with_suffix(".log").open("ab") as log:
        return subprocess.Popen([sys.executable, "-m", "jobs", "ppo", recipe, *given, *OPTIONS], stdout=log, stderr=log)


@dataclass(frozen=True)
class Outcome:
    """What has to be the same: a digest of the policy, and score, KL and policy loss of every step, of one done twice the last."""

    policy: str
    steps: dict[int, tuple[float, float, float]]

    @classmethod
    def of(cls, folder: Path) -> Outcome:
        digest = hashlib.sha256()
        for file in sorted((folder / "ppo" / "model").glob("*.safetensors")):
            digest.update(file.read_bytes())
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        steps = {line["step"]: line["metrics"] for line in lines if line["stage"] == "ppo"}
        return cls(digest.hexdigest(), {step: (m["score_mean"], m["kl"], m["policy_loss"]) for step, m in steps.items()})


def logged_steps(folder: Path) -> int:
    """Lines that the PPO loop has logged, those of repeated steps too."""
    return (folder / "metrics.jsonl").read_text().count('"stage": "ppo"')


def victims(process: subprocess.Popen[bytes], title: str) -> list[psutil.Process]:
    """Processes of the run whose title begins so; the driver itself for an empty title."""
    driver = psutil.Process(process.pid)
    if not title:
        return [driver]
    found = []
    for child in driver.children(recursive=True):
        try:
            if " ".join(child.cmdline()).startswith(title):
                found.append(child)
        except psutil.Error:
            continue
    return found


@dataclass(frozen=True)
class Round:
    """What was done and what came of it. hits: what was there to be hit at each moment; typed: how often the command was; due: at most."""

    hits: tuple[str | None, ...]
    typed: int
    due: int
    seconds: float


def disturbed_run(models: Path, folder: Path, plan: Sequence[tuple[Kind, float]], rng: random.Random) -> Round:
    """plan: disturbances, each so many seconds after the one before, and after the loop of the command typed last has begun."""
    log, began = folder.with_suffix(".log"), time.monotonic()
    process, typed, due, begun = start(models, folder), 1, 1, 0
    hits: list[str | None] = []
    for kind, after in plan:
        while process.poll() is None and log.read_text().count(LOOP_BEGINS) <= begun:
            time.sleep(0.2)
        time.sleep(after)
        found = victims(process, kind.title) if process.poll() is None else []
        if not found:
            hits.append(None)
            continue
        victim = rng.choice(found)
        hits.append(" ".join(victim.cmdline()).strip() if kind.title else "corral ppo")
        victim.send_signal(kind.signal)
        if kind.typed > 1 and process.wait(RUN_SECONDS):
            begun = log.read_text().count(LOOP_BEGINS)
            process, typed, due = start(models, folder), typed + 1, due + kind.typed - 1
    while code := process.wait(RUN_SECONDS):
        if time.monotonic() - began > 2 * RUN_SECONDS or typed > due + 3:
            raise SystemExit(f"the run does not end well (exit code {code}); see {log}")
        process, typed = start(models, folder), typed + 1
    return Round(tuple(hits), typed, due, time.monotonic() - began)


def undisturbed(models: Path, folder: Path) -> Outcome:
    """Of a run in `folder`, which may be there from an earlier session."""
    if not (folder / "summary.json").is_file() and start(models, folder).wait(RUN_SECONDS):
        raise SystemExit(f"the undisturbed run failed; see {folder.with_suffix('.log')}")
    return Outcome.of(folder)


def main() -> None:
    """Prints a table with a row per round; exit code 1 when a run differs from the undisturbed one, or does not go on by itself."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="run folder with sft/model and rm/model, such as runs/demo")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS), help="taken in turn; default: all")
    parser.add_argument("--together", type=int, default=1, help="disturbances of one run")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of victims and moments")
    parser.add_argument("--longest", type=float, default=12.0, help="seconds to a kill, at most")
    parser.add_argument("--folder", type=Path, help="where the runs go; an undisturbed run that is there already is not repeated")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    root: Path = arguments.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    root.mkdir(parents=True, exist_ok=True)
    print(f"seed {arguments.seed}, runs under {root}", flush=True)
    expected = undisturbed(arguments.models, root / "straight")
    print("\n| disturbance | after | what it hit | command typed | steps logged | seconds | policy and metrics |", flush=True)
    print("|---|---|---|---|---|---|---|", flush=True)
    good = True
    for number in range(arguments.rounds):
        names = [arguments.kinds[(number * arguments.together + k) % len(arguments.kinds)] for k in range(arguments.together)]
        plan = [(KINDS[name], rng.uniform(0, arguments.longest)) for name in names]
        folder = root / f"seed-{arguments.seed}-round-{number}"
        done = disturbed_run(arguments.models, folder, plan, rng)
        same = Outcome.of(folder) == expected
        good &= same and done.typed <= done.due
        row = (
            ", ".join(names),
            ", ".join(f"{after:.1f} s" for _, after in plan),
            ", ".join(hit or "nothing: too early or too late" for hit in done.hits),
            done.typed,
            logged_steps(folder),
            f"{done.seconds:.0f}",
        )
        print(f"| {' | '.join(map(str, row))} | {'the same' if same else 'DIFFERENT'} |", flush=True)
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
