"""How SFT scales from one worker to two, beside how a plain float32 matrix product scales from one process to two.

Both trainings are real ones (Ray Train, DeepSpeed, gloo) on the same global batches of random tokens, one thread a worker. All processes
live through the whole measurement and take turns: a product in one process, a step on one worker, a product in both processes, a step
on two workers. So whatever the machine does to one number it does to the others. A ratio near 2 is perfect; `efficiency` is the
training's ratio in parts of the product's, which is what the hardware gives.

    .venv/bin/python bench/scaling.py --model FOLDER --steps 8 --json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # a script's own folder leads sys.path; the packages lie beside it

WORKERS = {"product 1": (2, 1), "train 1": (1, 1), "product 2": (2, 2), "train 2": (2, 2)}
"""Each turn of a round: in the group of how many workers, and on how many of them."""
MATRIX, ROWS = 1024, 32
VOCABULARY = 250
"""Token ids that rows are made of; every model has as many."""


class Turns:
    """An async actor: whose turn it is, and the seconds that every turn took."""

    def __init__(self, rounds: int) -> None:
        self._order = [phase for _ in range(rounds) for phase in WORKERS]
        self._seconds: list[list[float]] = [[] for _ in self._order]
        self._moved = asyncio.Condition()
        self._now = 0

    async def wait(self, number: int) -> None:
        async with self._moved:
            await self._moved.wait_for(lambda: self._now >= number)

    async def done(self, number: int, seconds: float) -> None:
        """One worker's part of a turn; the last one to finish passes the turn on."""
        async with self._moved:
            self._seconds[number].append(seconds)
            if len(self._seconds[number]) == WORKERS[self._order[number]][1]:
                self._now += 1
                self._moved.notify_all()

    async def seconds(self) -> dict[str, list[float]]:
        """Of the slowest worker, by phase; without the first round, which warms caches up."""
        measured = list(zip(self._order, self._seconds, strict=True))[len(WORKERS) :]
        return {phase: [max(times) for name, times in measured if name == phase] for phase in WORKERS}


def take_turns(job: Any, turns: Any, rounds: int, products: int) -> None:
    """What Ray Train runs on every worker of one group."""
    import ray
    import torch

    from app.workers.training_loop import TrainingLoop

    loop = TrainingLoop(job)
    matrix = torch.rand(MATRIX, MATRIX)

    def multiply() -> None:
        for _ in range(products):
            torch.mm(matrix, matrix)

    work: Mapping[str, Callable[[], object]] = {"product": multiply, "train": loop.train_step}
    for number, phase in enumerate(list(WORKERS) * rounds):
        group, workers = WORKERS[phase]
        if group != loop.world_size or loop.rank >= workers:
            continue
        ray.get(turns.wait.remote(number))
        began = time.perf_counter()
        work[phase.split()[0]]()
        ray.get(turns.done.remote(number, time.perf_counter() - began))


def make_rows(folder: Path, length: int) -> None:
    import numpy as np

    from app.data.token_cache import HELD_OUT_FILE, TRAIN_FILE, SftRow, write_threads

    rng = np.random.default_rng(0)
    for file in (TRAIN_FILE, HELD_OUT_FILE):
        write_threads(
            [SftRow(rng.integers(VOCABULARY, size=length, dtype=np.int32), np.ones(length, bool)) for _ in range(ROWS)], folder / file
        )


def run_group(arguments: argparse.Namespace, count: int, folder: Path, turns: Any, events: Any) -> None:
    """A Ray Train run of `count` workers."""
    import ray.train
    from ray.train.torch import TorchTrainer

    from app.config.shared import DeepSpeedConfig, OptimizerConfig, WorkersConfig
    from app.config.training import SftConfig
    from app.data.mixture import Mixture
    from app.tasks.sft import SftTask
    from app.workers.processes import process_environment
    from app.workers.supervised_task import TrainingJob
    from bench import scaling  # under this name the workers can import it

    workers = WorkersConfig(count=count, cpus=0.1)
    config = SftConfig(
        batch_size=arguments.batch,
        micro_batch_size=arguments.batch // 2,
        optimizer=OptimizerConfig(lr=1e-6),
        deepspeed=DeepSpeedConfig(zero_stage=arguments.zero),
        workers=workers,
    )
    task = SftTask(folder, str(Path(arguments.model).absolute()), "fp32", False, config)
    mixture = Mixture.of([""] * ROWS, {})
    model, checkpoints = folder / "model", folder / f"checkpoints-{count}"
    job = TrainingJob(task, config, "fp32", 0, arguments.steps, mixture, model, checkpoints, events, deadline_seconds=1800)
    trainer = TorchTrainer(
        partial(scaling.take_turns, job, turns, arguments.steps, arguments.products),
        scaling_config=ray.train.ScalingConfig(num_workers=count, resources_per_worker={"CPU": workers.cpus}),
        run_config=ray.train.RunConfig(
            name=f"group-{count}", storage_path=str(folder), worker_runtime_env={"env_vars": process_environment(workers)}
        ),
    )
    trainer.fit()


class Nowhere:
    """A tracker for a training that logs nothing."""

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None: ...

    def event(self, stage: str, step: int, text: str) -> None: ...


def run(arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of every turn, by phase."""
    import ray

    from app.workers.event_channel import EventChannel
    from bench import scaling
    from jobs.local_ray import running_ray

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_rows(folder, arguments.length)
        # where one group fails, the end of Ray ends the other one, which the pool then waits for
        with ThreadPoolExecutor() as pool, running_ray(folder / "logs"), EventChannel(Nowhere()) as channel:
            turns = ray.remote(num_cpus=0)(scaling.Turns).remote(arguments.steps)
            groups = [pool.submit(run_group, arguments, count, folder, turns, channel.sender) for count in (1, 2)]
            for group in as_completed(groups):
                group.result()
            seconds: dict[str, list[float]] = ray.get(turns.seconds.remote())
    return seconds


def summarise(seconds: Mapping[str, list[float]]) -> dict[str, Any]:
    """Ratios of the medians; each process of the product does a whole one, the training's workers share one batch."""
    median = {phase: statistics.median(times) for phase, times in seconds.items()}
    training = median["train 1"] / median["train 2"]
    product = 2 * median["product 1"] / median["product 2"]
    return {"training_ratio": training, "product_ratio": product, "efficiency": training / product, "seconds": median}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a causal language model")
    parser.add_argument("--steps", type=int, default=8, help="rounds, of which the first is not counted; one optimizer step each")
    parser.add_argument("--batch", type=int, default=8, help="rows per optimizer step over all workers; even")
    parser.add_argument("--length", type=int, default=320, help="tokens per row; Open-Assistant's threads have 320 on average")
    parser.add_argument("--products", type=int, default=40, help=f"products of {MATRIX} x {MATRIX} matrices per turn")
    parser.add_argument("--zero", type=int, default=1, choices=(0, 1, 2, 3), help="ZeRO stage")
    parser.add_argument("--json", action="store_true", help="print only one JSON object")
    arguments = parser.parse_args()
    if arguments.steps < 2 or arguments.batch % 2:
        parser.error("--steps must be at least 2, and --batch even")
    result = summarise(run(arguments))
    if not arguments.json:
        for phase, spent in result["seconds"].items():
            sys.stdout.write(f"{phase:10s} {spent:7.3f} s\n")
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
