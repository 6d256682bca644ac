"""Supervised stages: SFT and reward model share one shape."""

from __future__ import annotations

from pydantic import Field, model_validator

from app.config.shared import DeepSpeedConfig, OptimizerConfig, WorkersConfig
from app.schema import Config


class TrainingConfig(Config):
    """One supervised training: batches, steps, optimizer, workers."""

    epochs: float = Field(1.0, gt=0)
    """Passes over the training set (fractions allowed)."""
    max_steps: int | None = Field(None, ge=1)
    """Stop after this many optimizer steps, whatever `epochs` says."""
    batch_size: int = Field(32, ge=1)
    """Samples per optimizer step over all workers (SFT: threads, RM: ranked groups)."""
    micro_batch_size: int = Field(8, ge=1)
    """Samples per forward pass on one worker."""
    eval_every: int = Field(50, ge=1)
    """Optimizer steps between evaluations on the held-out part (always once before and after)."""
    save_every: int = Field(200, ge=1)
    """Optimizer steps between checkpoints."""
    log_every: int = Field(10, ge=1)
    """Optimizer steps between logged points."""
    optimizer: OptimizerConfig = OptimizerConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    workers: WorkersConfig = WorkersConfig()

    @model_validator(mode="after")
    def _batch_divides(self) -> TrainingConfig:
        unit = self.micro_batch_size * self.workers.count
        if self.batch_size % unit:
            raise ValueError(
                f"batch_size = {self.batch_size} is no multiple of micro_batch_size x workers.count = "
                f"{self.micro_batch_size} x {self.workers.count}: choose a multiple of {unit}"
            )
        return self

    @property
    def accumulation(self) -> int:
        """Micro-batches per optimizer step on each worker."""
        return self.batch_size // (self.micro_batch_size * self.workers.count)


class SftConfig(TrainingConfig):
    """Supervised fine-tuning on assistant turns."""

    packing: bool = False
    """Put several threads of a micro-batch into one row of up to data.max_length tokens, each attending to itself alone."""


class RewardModelConfig(TrainingConfig):
    """Bradley-Terry training over ranked groups."""

    max_replies: int = Field(5, ge=2)
    """Replies per group; the best-ranked ones are kept."""
    score_l2: float = Field(0.001, ge=0)
    """Weight of the squared scores in the loss, which keeps them near 0."""
    offset_samples: int = Field(128, ge=1)
    """Answers of the SFT model whose mean score becomes `reward_offset`."""
