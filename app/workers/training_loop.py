"""The workers' side of supervised training: one process per rank, a DeepSpeed engine in each.

Every rank knows the whole global batch of every step, so the exact loss denominator needs no communication.
"""

from __future__ import annotations

import math
import shutil
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import ray.train.torch
import torch
import torch.distributed as dist

from app.data.batch_order import PassLimit, evaluation_batches, micro_batches, step_rows
from app.data.token_cache import TRAIN_FILE
from app.durable import read_json, replace_folder, settle_folder, write_json
from app.errors import CheckpointError, ConfigError, NonFiniteError
from app.run_layout import BEST_MODEL, HELD_OUT_METRICS, SAVING
from app.workers.deepspeed_engine import backward_scaled, begin_micro_batch, full_weights, load_engine, optimizer_step, start_engine
from app.workers.shared_checkpoints import SharedCheckpoints
from app.workers.stacks import write_stacks_on_signal
from app.workers.supervised_task import TrainingJob, TrainingResult, WorkerOutcome


@dataclass
class Progress:
    """What a checkpoint keeps beside the engine. `step` counts finished optimizer steps, `stale` evaluations since `best_loss`."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    before: dict[str, float] = field(default_factory=dict)
    evaluated: dict[str, float] = field(default_factory=dict)
    evaluated_step: int = -1
    best_loss: float = math.inf
    stale: int = 0


@dataclass
class Window:
    """What happened since the last logged point."""

    losses: list[float] = field(default_factory=list)
    grad_norm: float = 0.0
    lr: float = 0.0
    tokens: int = 0
    seconds: float = 0.0


def train_worker(job: TrainingJob) -> WorkerOutcome:
    """The function that Ray Train runs on every rank."""
    try:
        return TrainingLoop(job).run()
    except (NonFiniteError, CheckpointError, ConfigError) as error:  # every rank raises it at the same point, and would after a restart
        return WorkerOutcome(error=error)
    finally:
        job.events.flush()


class TrainingLoop:
    """One rank. Making it builds the engine and restores the newest complete checkpoint. Raises CheckpointError."""

    def __init__(self, job: TrainingJob) -> None:
        self.job, self.task, self.config = job, job.task, job.config
        torch.set_num_threads(job.config.workers.threads)
        job.events.stop_requested()  # the first call only places the order; by the first step the answer may be there
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        write_stacks_on_signal(f"training rank {self.rank}")
        self.device: torch.device = ray.train.torch.get_device()
        self.checkpoints = SharedCheckpoints(
            job.checkpoint_folder, self.config.keep_checkpoints, self.device, deadline_seconds=job.deadline_seconds
        )
        saved = self.checkpoints.newest()
        self.train_rows, self.held_out = self.task.load_rows()
        self.shapes = [self.task.shape(row) for row in self.train_rows]
        self.held_out_sets: dict[str, list[int]] = defaultdict(list)
        for index, row in enumerate(self.held_out):
            self.held_out_sets[row.dataset].append(index)
        self.progress, self.window = Progress(), Window()
        self.engine = start_engine(
            self.task.build_model(),
            self.config.optimizer,
            self.config.deepspeed,
            precision=job.precision,
            micro_batch_size=self.config.micro_batch_size,
            accumulation=self.config.accumulation,
            total_steps=job.steps,
        )
        self.limit = PassLimit(self.config.micro_batch_size, self.config.micro_batch_tokens, padded=self.task.padded(self.engine))
        torch.manual_seed(job.seed + self.rank)  # ranks draw dropout masks of their own
        if saved is not None:
            state = load_engine(self.engine, saved)
            self.progress, self.window = Progress(**state["progress"]), Window(**state["window"])
            if self.config.keep_best and math.isfinite(self.progress.best_loss):
                self.look_for_best()

    def run(self) -> WorkerOutcome:
        """Train to the last step, out of patience, or to a stop request, which alone leaves no model. Every checkpoint is committed when
        it returns."""
        with self.checkpoints:
            return self.train()

    def train(self) -> WorkerOutcome:
        """`run`, of which the last checkpoint may still be on its way to the disk."""
        progress, stop = self.progress, False
        self.begin()
        while progress.step < self.job.steps and not stop and not self.out_of_patience:
            stop = self.train_step()
            self.checkpoints.settle(wait_for_it=False)
            step = progress.step
            if step % self.config.log_every == 0 or step == self.job.steps:
                self.log()
                self.window = Window()
            if self.evaluation_due and not stop:
                self.judge()
            if stop or (step % self.config.save_every == 0 and step < self.job.steps):
                self.checkpoints.save(step, self.engine, {"progress": asdict(progress), "window": asdict(self.window)})
        if stop and progress.step < self.job.steps:
            return WorkerOutcome(progress.step)
        if progress.evaluated_step != progress.step:
            self.judge()
        if self.config.keep_best:
            after = self.take_best()
        else:
            after = progress.evaluated
            self.export(self.job.model_folder)
        result = TrainingResult(progress.before, after, progress.step, progress.tokens, progress.seconds)
        return WorkerOutcome(progress.step, result=result)

    def begin(self) -> None:
        """What is due before the next step. From here on the driver knows that there is something to stop."""
        progress = self.progress
        if not progress.before:
            progress.before = self.evaluate()
        if self.evaluation_due:  # a stop has not waited for it
            self.judge()
        if self.rank == 0:
            self.job.events.log(self.task.stage, progress.step, {})

    def train_step(self) -> bool:
        """One optimizer step; returns whether the driver asked to stop. Raises NonFiniteError."""
        began = time.perf_counter()
        progress, window = self.progress, self.window
        indices = step_rows(progress.step, mixture=self.job.mixture, batch_size=self.config.batch_size, seed=self.job.seed)
        denominator = sum(self.task.weight(self.train_rows[i]) for i in indices)
        mine = micro_batches(indices, self.shapes, self.limit, rank=self.rank, world_size=self.world_size)
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        parts: list[torch.Tensor] = []
        for number, batch in enumerate(mine):
            if number:
                optimizer_step(self.engine)  # within an accumulation it only counts
            begin_micro_batch(self.engine, last=number == len(mine) - 1)
            part = self.task.loss(self.engine, [self.train_rows[i] for i in batch], self.device) / denominator
            backward_scaled(self.engine, part)
            parts.append(part.detach())
            loss += parts[-1]
        total, stop = self.agree(loss)
        if not math.isfinite(total):
            raise NonFiniteError(
                f"{self.task.stage}: loss is {total} in step {progress.step + 1}, before the optimizer step{self.blame(mine, parts)}: "
                "lower optimizer.lr, or look for broken rows in the data"
            )
        window.lr = self.engine.get_lr()[0]
        norm = optimizer_step(self.engine, f"{self.task.stage}, step {progress.step + 1}")
        assert norm is not None
        window.grad_norm = norm
        window.losses.append(total)
        progress.step += 1
        seconds, tokens = time.perf_counter() - began, sum(self.shapes[i].tokens for i in indices)
        progress.tokens, progress.seconds = progress.tokens + tokens, progress.seconds + seconds
        window.tokens, window.seconds = window.tokens + tokens, window.seconds + seconds
        return stop

    def blame(self, batches: list[list[int]], parts: list[torch.Tensor]) -> str:
        """The rows of each rank's first micro-batch whose loss is not finite, in words. Collective."""
        first: list[int] = next((batch for batch, part in zip(batches, parts, strict=True) if not torch.isfinite(part)), [])
        found: list[list[int]] = [[] for _ in range(self.world_size)]
        dist.all_gather_object(found, first)
        rows = sorted(row for batch in found for row in batch)
        return f", among rows {', '.join(map(str, rows))} (from 0) of {TRAIN_FILE}" if rows else ""

    def agree(self, loss: torch.Tensor) -> tuple[float, bool]:
        """The loss summed over ranks, and whether to stop after this step: the same answer everywhere."""
        asked = self.rank == 0 and self.job.events.stop_requested()
        vector = torch.stack([loss, loss.new_tensor(float(asked))])
        dist.all_reduce(vector)
        total, stop = vector.tolist()
        return total, stop > 0

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Held-out metrics of the current weights, each row computed on one rank, logged as `eval_*`. The same on every rank."""
        progress = self.progress
        if progress.evaluated_step == progress.step:
            return progress.evaluated
        self.engine.eval()
        sums = {dataset: self.evaluation_sums(rows) for dataset, rows in self.held_out_sets.items()}
        self.engine.train()
        total = {name: sum(of_set[name] for of_set in sums.values()) for name in next(iter(sums.values()))}
        progress.evaluated = self.task.summarise(total)
        if len(sums) > 1:
            each = {dataset: self.task.summarise(of_set) for dataset, of_set in sums.items()}
            progress.evaluated |= {f"{dataset}/{name}": value for dataset, found in each.items() for name, value in found.items()}
        progress.evaluated_step = progress.step
        if self.rank == 0:
            metrics = {f"eval_{name}": value for name, value in progress.evaluated.items()}
            self.job.events.log(self.task.stage, progress.step, metrics)
        return progress.evaluated

    def evaluation_sums(self, indices: Sequence[int]) -> dict[str, float]:
        """What `SupervisedTask.evaluate` adds up to over some held-out rows, each computed on one rank. The same on every rank."""
        shapes = [self.task.shape(self.held_out[i]) for i in indices]
        sums: dict[str, float] = defaultdict(float)
        for batch in evaluation_batches(shapes, self.limit, rank=self.rank, world_size=self.world_size):
            # An empty share still takes part, because under ZeRO 3 every forward pass is a collective.
            rows = [self.held_out[indices[k]] for k in batch or [0]]
            for name, value in self.task.evaluate(self.engine, rows, self.device).items():
                sums[name] += value if batch else 0.0
        names = sorted(sums)
        vector = torch.tensor([sums[name] for name in names], dtype=torch.float64, device=self.device)
        dist.all_reduce(vector)
        return dict(zip(names, vector.tolist(), strict=True))

    @property
    def evaluation_due(self) -> bool:
        """Whether the step done last is one that is evaluated, apart from the last of all, and has not been."""
        step = self.progress.step
        return self.progress.evaluated_step != step and 0 < step < self.job.steps and step % self.config.eval_every == 0

    @property
    def out_of_patience(self) -> bool:
        return self.config.patience is not None and self.progress.stale >= self.config.patience

    def judge(self) -> None:
        """Evaluate, and keep the model where `keep_best` wants it. The same on every rank.

        Raises NonFiniteError for a held-out loss that is not finite.
        """
        progress = self.progress
        loss = self.evaluate()["loss"]
        if not math.isfinite(loss):
            raise NonFiniteError(f"{self.task.stage}: held-out loss is {loss} after step {progress.step}: lower optimizer.lr")
        if loss < progress.best_loss:
            progress.best_loss, progress.stale = loss, 0
            if self.config.keep_best:
                self.export(self.best_folder)
        else:
            progress.stale += 1

    def log(self) -> None:
        """Send means since the last logged point."""
        if self.rank:
            return
        step, window = self.progress.step, self.window
        metrics = {
            "loss": sum(window.losses) / len(window.losses),
            "grad_norm": window.grad_norm,
            "tokens_per_second": window.tokens / window.seconds,
            "lr": window.lr,
            "epoch": step * self.config.batch_size / self.job.mixture.rows_per_epoch,
        }
        self.job.events.log(self.task.stage, step, metrics)

    @property
    def best_folder(self) -> Path:
        """Where the best model so far waits for the end of training."""
        return self.job.model_folder.with_name(BEST_MODEL)

    def export(self, target: Path) -> None:
        """Replace a model folder in one step, so that what is there is complete; held-out metrics go with it. Collective."""
        unfinished = target.with_name(f"{target.name}{SAVING}")
        with full_weights(self.engine):
            if self.rank == 0:
                shutil.rmtree(unfinished, ignore_errors=True)
                self.task.export(self.engine.module, unfinished)
                write_json(unfinished / HELD_OUT_METRICS, {"step": self.progress.step, "metrics": self.progress.evaluated})
                replace_folder(target, unfinished)
        dist.barrier()

    def look_for_best(self) -> None:
        """Judge anew where the best model did not come along with the checkpoint. Collective."""
        if self.rank == 0:
            settle_folder(self.best_folder)
        dist.barrier()
        if not any((folder / HELD_OUT_METRICS).is_file() for folder in (self.best_folder, self.job.model_folder)):
            self.progress.best_loss, self.progress.stale, self.progress.evaluated_step = math.inf, 0, -1

    def take_best(self) -> dict[str, float]:
        """Make the best model the stage's model; returns its held-out metrics. Collective.

        A run that was stopped after its training, before its stage was committed, has done so already.
        """
        if self.rank == 0:
            settle_folder(self.best_folder)
        dist.barrier()
        waits = self.best_folder.is_dir()
        metrics: dict[str, float] = read_json((self.best_folder if waits else self.job.model_folder) / HELD_OUT_METRICS)["metrics"]
        dist.barrier()
        if waits and self.rank == 0:
            replace_folder(self.job.model_folder, self.best_folder)
        dist.barrier()
        return metrics
