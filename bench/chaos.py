"""Kills one process of a PPO run after another, at random moments, and compares what the run leaves with an undisturbed one.

Runs are exact (run.determinism = "exact"), so every run has to end with the same policy, bit for bit: one that loses a rollout
engine or a scoring replica by itself, one that loses a learner or its driver by the same command typed again.

    python -m bench.chaos --models runs/demo --rounds 8
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
from pathlib import Path

import psutil

VICTIMS = {
    "rollout engine": "ray::RolloutEngine",
    "scoring replica": "ray::ServeReplica",
    "learner rank": "ray::LearnerWorker",
    "driver": "",
}
OPTIONS = (
    "--run.determinism=exact", "--ppo.steps=4", "--ppo.save_every=1", "--ppo.batch_size=32", "--evaluation.prompts=16",
    "--run.deadline_seconds=300",
)  # fmt: skip
RUN_SECONDS = 900


def start(models: Path, folder: Path) -> subprocess.Popen[bytes]:
    """The run in the background; its output is in `folder`.log."""
    recipe = "jobs/recipes/tiny/ppo.toml"
    given = [f"--model.path={models / 'sft/model'}", f"--reward.path={models / 'rm/model'}", f"--run.dir={folder}"]
    with folder.with_suffix(".log").open("ab") as log:
        return subprocess.Popen([sys.executable, "-m", "jobs", "ppo", recipe, *given, *OPTIONS], stdout=log, stderr=log)


def policy_digest(folder: Path) -> str:
    """Of the weights that the run has left."""
    digest = hashlib.sha256()
    for file in sorted((folder / "ppo" / "model").glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def curve(folder: Path) -> dict[int, tuple[float, float, float]]:
    """Score, KL and policy loss of every step; of a step that was done twice the last."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = {line["step"]: line["metrics"] for line in lines if line["stage"] == "ppo"}
    return {step: (metrics["score_mean"], metrics["kl"], metrics["policy_loss"]) for step, metrics in steps.items()}


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


def disturbed_run(models: Path, folder: Path, kind: str, after: float, rng: random.Random) -> tuple[bool, int]:
    """(whether a process was killed, how often the command was typed). `after`: seconds from the first step's start to the kill."""
    process = start(models, folder)
    log, killed, typed = folder.with_suffix(".log"), False, 1
    began = time.monotonic()
    while "ppo" not in log.read_text() and process.poll() is None:  # the stage has begun
        time.sleep(0.2)
    time.sleep(after)
    if process.poll() is None and (found := victims(process, VICTIMS[kind])):
        rng.choice(found).send_signal(signal.SIGKILL)
        killed = True
    while (code := process.wait(RUN_SECONDS)) != 0:
        if time.monotonic() - began > RUN_SECONDS or typed > 3:
            raise SystemExit(f"{kind}: the run does not end well (exit code {code}); see {log}")
        process, typed = start(models, folder), typed + 1
    return killed, typed


def main() -> None:
    """Prints a line per round; exit code 1 when a run differs from the undisturbed one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="run folder with sft/model and rm/model, such as runs/demo")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of victims and moments")
    parser.add_argument("--longest", type=float, default=25.0, help="latest moment of a kill, seconds into the stage")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    root = Path(tempfile.mkdtemp(prefix="chaos-"))
    print(f"seed {arguments.seed}, runs under {root}", flush=True)
    straight = root / "straight"
    if start(arguments.models, straight).wait(RUN_SECONDS):
        raise SystemExit(f"the undisturbed run failed; see {straight.with_suffix('.log')}")
    expected = policy_digest(straight), curve(straight)
    different = 0
    for number in range(arguments.rounds):
        kind = list(VICTIMS)[number % len(VICTIMS)]
        after, folder = rng.uniform(0, arguments.longest), root / f"round-{number}"
        killed, typed = disturbed_run(arguments.models, folder, kind, after, rng)
        same = (policy_digest(folder), curve(folder)) == expected
        different += not same
        what = f"{kind} killed after {after:.1f} s" if killed else f"{kind}: the run was over, or had none yet, after {after:.1f} s"
        print(f"round {number}: {what}; command typed {typed} times; {'the same' if same else 'DIFFERENT'} policy and metrics", flush=True)
    raise SystemExit(1 if different else 0)


if __name__ == "__main__":
    main()
