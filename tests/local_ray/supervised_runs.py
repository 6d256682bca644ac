"""Small SFT and reward-model runs on two gloo workers, and faults in them. `python -m tests.local_ray.supervised_runs STAGE ROOT`
is a driver of its own, to be killed."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train.torch import TorchTrainer

from app.config.shared import WorkersConfig
from app.config.training import RewardModelConfig, SftConfig, TrainingConfig
from app.data.mixture import Mixture
from app.data.token_cache import HELD_OUT_FILE, TRAIN_FILE, GroupRow, SftRow, write_groups, write_threads
from app.tasks.reward_model import RewardModelTask
from app.tasks.sft import SftTask
from app.workers.event_channel import EventSender
from app.workers.processes import process_environment
from app.workers.supervised_task import SupervisedTask, TrainingJob, TrainingResult, WorkerOutcome
from app.workers.training import fit
from app.workers.training_loop import train_worker
from tests.tiny_models import SPECIAL, VOCABULARY, make_neox
from tests.waiting import wait_until

SEED = 3
ROWS, HELD_OUT_ROWS = 21, 7
DEADLINE = 300.0
MIXTURE = Mixture.of([""] * ROWS, {})
SHAPE = {"batch_size": 8, "micro_batch_size": 2, "log_every": 2, "eval_every": 2, "save_every": 3}
OPTIMIZER = {"lr": 2e-2, "eps": 1e-4, "warmup_steps": 2}
TWO_WORKERS = {"count": 2, "cpus": 0.5}
SFT = SftConfig.model_validate(
    SHAPE
    | {
        "max_steps": 11,
        "patience": 3,
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.2},
        "optimizer": OPTIMIZER | {"schedule": "linear"},
        "deepspeed": {"zero_stage": 2},
        "workers": TWO_WORKERS,
    }
)
RM = RewardModelConfig.model_validate(
    SHAPE
    | {
        "max_steps": 11,
        "keep_best": True,
        "optimizer": OPTIMIZER | {"schedule": "cosine"},
        "deepspeed": {"zero_stage": 3},
        "workers": TWO_WORKERS,
    }
)
CONFIGS: dict[str, TrainingConfig] = {"sft": SFT, "rm": RM}
WORKER_DIES, JOB_DIES = 4, 7
"""Finished optimizer steps at which rank 1, and later the whole job, is killed: behind the checkpoints of steps 3 and 6, which are on the
disk by then."""

LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "zero0": ("fp32", {"zero_stage": 0}),
    "zero1": ("fp32", {"zero_stage": 1}),
    "zero1 recomputing": ("fp32", {"zero_stage": 1, "gradient_checkpointing": True}),
    "zero2": ("fp32", {"preset": "zero2"}),
    "zero2 offload": ("fp32", {"preset": "zero2_offload"}),
    "zero3": ("fp32", {"preset": "zero3"}),
    "zero3 offload": ("fp32", {"preset": "zero3_offload"}),
    "bf16 zero1": ("bf16", {"zero_stage": 1}),
    "bf16 zero2 offload": ("bf16", {"preset": "zero2_offload"}),
    "bf16 zero3 offload": ("bf16", {"preset": "zero3_offload_rl"}),
    "fp16": ("fp16", {"zero_stage": 2}),
}
"""Precision and DeepSpeed section of short SFT runs that differ in nothing else."""
LAYOUT_STEPS = 4


@dataclass(frozen=True)
class Fault:
    """SIGKILL to `pid` (None: the worker itself) from rank 1, once, in the last micro-batch of the step after `step`, as soon as the
    checkpoint `behind` is committed.

    `marker` then holds the worker's process id.
    """

    step: int
    marker: Path
    behind: Path
    pid: int | None = None

    def strike(self, engine: Any) -> None:
        if engine.global_steps != self.step or not engine.is_gradient_accumulation_boundary() or dist.get_rank() != 1:
            return
        if self.marker.exists():
            return
        wait_until(self.behind.is_dir, "the commit of the checkpoint before")
        self.marker.write_text(str(os.getpid()))
        os.kill(self.pid or os.getpid(), signal.SIGKILL)
        time.sleep(600)  # Ray ends the workers of a dead driver; nothing of this run may be computed meanwhile


@dataclass(frozen=True)
class FaultySftTask(SftTask):
    faults: tuple[Fault, ...] = ()

    def loss(self, engine: Any, rows: Sequence[SftRow], device: torch.device) -> torch.Tensor:
        strike(self.faults, engine)
        return super().loss(engine, rows, device)


@dataclass(frozen=True)
class FaultyRewardModelTask(RewardModelTask):
    faults: tuple[Fault, ...] = ()

    def loss(self, engine: Any, rows: Sequence[GroupRow], device: torch.device) -> torch.Tensor:
        strike(self.faults, engine)
        return super().loss(engine, rows, device)


def strike(faults: Sequence[Fault], engine: Any) -> None:
    if torch.is_grad_enabled():  # in training, not in evaluation
        evaluating = [name for name, part in engine.module.named_modules() if not part.training]
        assert not evaluating, f"no dropout, and no recomputing, in {evaluating}"
        for fault in faults:
            fault.strike(engine)


@dataclass(frozen=True)
class Points:
    """A tracker: every point as one JSON line of `file`, on disk before `log` returns."""

    file: Path

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        with self.file.open("a") as out:
            out.write(json.dumps({"step": step, **metrics}) + "\n")

    def read(self) -> list[dict[str, float]]:
        """Every point without what depends on the clock."""
        points = [json.loads(line) for line in self.file.read_text().splitlines()] if self.file.exists() else []
        return [{name: value for name, value in point.items() if name != "tokens_per_second"} for point in points]


def write_inputs(root: Path) -> None:
    """A model, threads and ranked groups of random tokens under `root`."""
    rng = np.random.default_rng(SEED)

    def tokens(low: int, high: int) -> np.ndarray[Any, np.dtype[np.int32]]:
        return rng.integers(len(SPECIAL), VOCABULARY, size=rng.integers(low, high), dtype=np.int32)

    make_neox(root / "base")
    for file, count in ((TRAIN_FILE, ROWS), (HELD_OUT_FILE, HELD_OUT_ROWS)):
        threads = [tokens(4, 30) for _ in range(count)]
        write_threads([SftRow(ids, np.arange(len(ids)) >= 2) for ids in threads], root / "sft-data" / file)
        write_groups([GroupRow(f"g{i}", tuple(tokens(4, 20) for _ in range(3))) for i in range(count)], root / "rm-data" / file)


def make_task(stage: str, root: Path, faults: tuple[Fault, ...] = ()) -> SupervisedTask:
    if stage == "sft":
        return FaultySftTask(root / "sft-data", str(root / "base"), "fp32", False, SFT, seed=SEED, faults=faults)
    return FaultyRewardModelTask(root / "rm-data", str(root / "base"), SEED, False, RM, faults=faults)


def train(stage: str, root: Path, faults: tuple[Fault, ...] = ()) -> TrainingResult:
    """`fit` in `root/STAGE`, which goes on from the checkpoints there. Points go to `root/STAGE.jsonl`."""
    config = CONFIGS[stage]
    assert config.max_steps is not None
    return fit(
        make_task(stage, root, faults), config, steps=config.max_steps, mixture=MIXTURE, precision="fp32", seed=SEED,
        folder=root / stage, tracker=Points(root / f"{stage}.jsonl"), deadline_seconds=DEADLINE,
    )  # fmt: skip


def undisturbed_job(stage: str, root: Path, folder: Path, events: EventSender) -> TrainingJob:
    """What `train` without faults gives its workers, leaving everything in `folder`."""
    config = CONFIGS[stage]
    assert config.max_steps is not None
    task, model, checkpoints = make_task(stage, root), folder / "model", folder / "checkpoints"
    return TrainingJob(task, config, "fp32", SEED, config.max_steps, MIXTURE, model, checkpoints, events, DEADLINE)


def layout_job(layout: str, root: Path, folder: Path, events: EventSender) -> TrainingJob:
    precision, deepspeed = LAYOUTS[layout]
    config = SftConfig.model_validate(
        {"batch_size": 8, "micro_batch_size": 2, "log_every": 1, "eval_every": 2, "save_every": 99}
        | {"optimizer": OPTIMIZER | {"max_grad_norm": 0.5}, "deepspeed": deepspeed, "workers": TWO_WORKERS}
    )
    task = SftTask(root / "sft-data", str(root / "base"), precision, False, config, seed=SEED)  # type: ignore[arg-type]
    return TrainingJob(task, config, precision, SEED, LAYOUT_STEPS, MIXTURE, folder / "model", folder / "checkpoints", events, DEADLINE)


def one_after_the_other(jobs: Sequence[TrainingJob]) -> list[WorkerOutcome]:
    """For Ray Train, on every rank: several runs without a start of processes for each."""
    return [train_worker(job) for job in jobs]


def in_one_group(jobs: Sequence[TrainingJob], folder: Path) -> list[WorkerOutcome]:
    """The outcome of each job on two workers that run all of them; Ray Train's own files go to `folder`."""
    trainer = TorchTrainer(
        partial(one_after_the_other, list(jobs)),
        scaling_config=ray.train.ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0.5}),
        run_config=ray.train.RunConfig(
            name="group", storage_path=str(folder), worker_runtime_env={"env_vars": process_environment(WorkersConfig())}
        ),
    )
    outcomes: list[WorkerOutcome] = trainer.fit().return_value
    return outcomes


def main() -> None:
    """A run whose rank 1 dies, goes on by itself, and then takes this driver with it."""
    stage, root = sys.argv[1], Path(sys.argv[2])
    ray.init(logging_level="ERROR", log_to_driver=False)
    checkpoints = root / stage / "checkpoints"
    worker_dies = Fault(WORKER_DIES, root / f"{stage}.worker-died", checkpoints / "step-00000003")
    job_dies = Fault(JOB_DIES, root / f"{stage}.job-died", checkpoints / "step-00000006", os.getpid())
    train(stage, root, (worker_dies, job_dies))
    sys.exit("the run ended, and should have been killed")


if __name__ == "__main__":
    main()
