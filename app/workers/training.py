"""Supervised training on Ray Train: the driver's side of a run. `app.workers.training_loop` is the workers' side."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from concurrent.futures import wait
from functools import partial
from pathlib import Path

import ray.train
from ray.train.torch import TorchTrainer

from app.background import in_thread
from app.config.training import TrainingConfig
from app.data.batch_order import total_steps
from app.data.mixture import Mixture
from app.errors import CorralError, Interrupted, first_line
from app.interfaces import Tracker
from app.run_layout import CHECKPOINTS, MODEL
from app.workers.deepspeed_engine import deepspeed_config
from app.workers.event_channel import EventChannel
from app.workers.processes import process_environment
from app.workers.supervised_task import SupervisedTask, TrainingJob, TrainingResult, WorkerOutcome
from app.workers.training_backend import NodesConfig
from app.workers.training_loop import train_worker
from app.workers.watchdog import late

MAX_FAILURES = 1
"""Times a run may lose a worker and go on by itself from its last checkpoint."""
POLL_SECONDS = 0.2
START_GRACE_SECONDS = 3.0
"""How long a request to stop waits for workers that are still starting, of which nothing has been heard: they have nothing to save."""
RAY_TRAIN_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # reports wait for the controller's next look at its workers, every 2 s by default
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # one more process, for a warning that the loop has no use for
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
}


def training_steps(config: TrainingConfig, rows_per_epoch: int) -> int:
    """Optimizer steps of a run whose epochs have so many rows."""
    return total_steps(rows_per_epoch, epochs=config.epochs, batch_size=config.batch_size, max_steps=config.max_steps)


def fit(
    task: SupervisedTask,
    config: TrainingConfig,
    *,
    steps: int,
    mixture: Mixture,
    precision: str,
    seed: int,
    folder: Path,
    tracker: Tracker,
    deadline_seconds: float,
    stop_requested: Callable[[], bool] = lambda: False,
) -> TrainingResult:
    """Train for `steps` optimizer steps and leave the model in `folder/model`; metrics go to `tracker` while it runs.

    Checkpoints are in `folder/checkpoints`; the same call goes on from the last one. Gradients are exact: neither the number
    of workers nor the micro-batch size changes the loss curve. `deadline_seconds` is the longest wait between two logged points, and for
    a checkpoint to be on the disk.
    Raises NonFiniteError, CheckpointError (checkpoints, none of which can be gone on from), Interrupted (when `stop_requested()`
    turns true, after saving a checkpoint), DeadlineError, what a worker or the tracker raised, or CorralError when workers died more than
    MAX_FAILURES times.
    """
    optimizer, micro, accumulation = config.optimizer, config.micro_batch_size, config.accumulation
    deepspeed_config(config.deepspeed, optimizer, precision=precision, micro_batch_size=micro, accumulation=accumulation)  # refuses early
    folder = folder.absolute()  # Ray Train changes the workers' directory
    with EventChannel(tracker) as channel:
        job = TrainingJob(
            task, config, precision, seed, steps, mixture, folder / MODEL, folder / CHECKPOINTS, channel.sender, deadline_seconds
        )  # fmt: skip
        trainer, phase = _trainer(job, folder), f"{task.stage} training"
        outcome = _wait_for(trainer, channel, stop_requested, phase=phase, deadline_seconds=deadline_seconds)
    if outcome.error is not None:
        raise outcome.error
    if outcome.result is None:
        raise Interrupted(f"{task.stage} stopped after step {outcome.steps} of {steps}; the same command goes on from there")
    return outcome.result


def _trainer(job: TrainingJob, folder: Path) -> TorchTrainer:
    for name, value in RAY_TRAIN_SETTINGS.items():
        os.environ.setdefault(name, value)
    workers = job.config.workers
    resources = {"CPU": workers.cpus} | ({"GPU": workers.gpus} if workers.gpus else {})
    return TorchTrainer(
        partial(train_worker, job),  # as train_loop_config the job would be unpickled, with all its imports, by the controller too
        torch_config=NodesConfig(),
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers.count, use_gpu=workers.gpus > 0, resources_per_worker=resources, label_selector=dict(workers.labels) or None
        ),
        run_config=ray.train.RunConfig(
            name=CHECKPOINTS,
            storage_path=str(folder),
            failure_config=ray.train.FailureConfig(max_failures=MAX_FAILURES),
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
            worker_runtime_env={"env_vars": process_environment(workers)},
        ),
    )


def _wait_for(
    trainer: TorchTrainer, channel: EventChannel, stop_requested: Callable[[], bool], *, phase: str, deadline_seconds: float
) -> WorkerOutcome:
    """Run the trainer in a thread, because in the main thread it would take over SIGINT, and pass a stop request on to the workers."""
    future = in_thread(trainer.fit, "corral-fit")
    asked, began = math.inf, channel.last_event
    while not wait([future], timeout=POLL_SECONDS).done:
        if channel.failure is not None:
            channel.request_stop()
            raise channel.failure
        if stop_requested() and asked == math.inf:
            channel.request_stop()
            asked = time.monotonic()
        if channel.last_event == began and time.monotonic() - asked > START_GRACE_SECONDS:
            raise Interrupted(f"{phase} stopped before its first step; the same command starts it again")
        if time.monotonic() - channel.last_event > deadline_seconds:
            channel.request_stop()
            raise late(
                phase, f"nothing logged for {deadline_seconds:g} s (raise run.deadline_seconds if log_every steps simply take that long)"
            )
    try:
        outcome: WorkerOutcome = future.result().return_value
    except ray.train.WorkerGroupError as error:
        raise _cause(error, phase) from error
    except ray.train.TrainingFailedError as error:
        raise CorralError(f"{phase} failed: {first_line(error)}; run the same command to go on from the last checkpoint") from error
    return outcome


def _cause(error: ray.train.WorkerGroupError, phase: str) -> CorralError:
    """The first error of ours that a worker raised, else a summary of how the first worker failed."""
    failures = [getattr(failure, "_base_exc", failure) for _, failure in sorted(error.worker_failures.items())]
    for failure in failures:
        if isinstance(failure, CorralError):
            return failure
    reason = f"{type(failures[0]).__name__}: {first_line(failures[0])}" if failures else first_line(error)
    return CorralError(f"{phase} failed {MAX_FAILURES + 1} times ({reason}); run the same command to go on from the last checkpoint")
