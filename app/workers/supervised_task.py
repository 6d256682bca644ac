"""What a supervised task provides, and what travels between the driver and its training workers.

SFT and reward model are two tasks of the same shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from app.config.training import TrainingConfig
from app.data.batch_order import RowShape
from app.data.mixture import Mixture
from app.errors import CorralError
from app.workers.event_channel import EventSender


class SupervisedTask(Protocol):
    """What is learnt: model, rows, loss, evaluation. Pickled to every worker, so it holds paths and settings, no data.

    A row is whatever `load_rows` makes; its `dataset` names the set that it is from. `engine` is the DeepSpeed engine around what
    `build_model` returned; losses and metrics go through calling it, because ZeRO 3 gathers parameters there.
    """

    @property
    def stage(self) -> str:
        """`sft` or `rm`: the name of the stage in metrics and messages."""
        ...

    def build_model(self) -> torch.nn.Module: ...

    def load_rows(self) -> tuple[Sequence[Any], Sequence[Any]]:
        """Rows to train on and held-out rows."""
        ...

    def shape(self, row: Any) -> RowShape:
        """The row's sequences and tokens, of which forward passes are composed."""
        ...

    def padded(self, engine: Any) -> bool:
        """Whether a forward pass gives each sequence the room of the longest."""
        ...

    def weight(self, row: Any) -> int:
        """The row's share of the loss denominator: target tokens (SFT), 1 or its pairs (a ranked group)."""
        ...

    def loss(self, engine: Any, rows: Sequence[Any], device: torch.device) -> torch.Tensor:
        """Scalar: the rows' losses, each times its weight, summed; with gradient."""
        ...

    def evaluate(self, engine: Any, rows: Sequence[Any], device: torch.device) -> dict[str, float]:
        """Sums over the rows (losses, counts, hits), which are added up over micro-batches and workers."""
        ...

    def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Metrics from the sums over all held-out rows; always has `loss`."""
        ...

    def export(self, model: torch.nn.Module, folder: Path) -> None:
        """Write `model` (what `build_model` returned, with full weights) as a Hugging Face folder. Rank 0 only."""
        ...


@dataclass(frozen=True)
class TrainingJob:
    """Everything a worker needs. `steps` is the total number of optimizer steps; `mixture` says which rows each of them takes;
    `deadline_seconds` is the longest wait for a checkpoint to be on the disk."""

    task: SupervisedTask
    config: TrainingConfig
    precision: str
    seed: int
    steps: int
    mixture: Mixture
    model_folder: Path
    checkpoint_folder: Path
    events: EventSender
    deadline_seconds: float


@dataclass(frozen=True)
class TrainingResult:
    """`before` and `after`: held-out metrics of `SupervisedTask.summarise`; tokens: real (non-padding) ones trained on;
    seconds: spent in optimizer steps."""

    before: dict[str, float]
    after: dict[str, float]
    steps: int
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True)
class WorkerOutcome:
    """How the workers ended, the same on every rank: with a result, an error they all saw, or (neither) asked to stop after `steps`."""

    steps: int = 0
    result: TrainingResult | None = None
    error: CorralError | None = None
