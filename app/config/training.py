"""Supervised stages: SFT and reward model share one shape."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from app.config.shared import AdapterConfig, DeepSpeedConfig, OptimizerConfig, WorkersConfig, require_one_way
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
    micro_batch_tokens: int | None = Field(None, ge=1)
    """Tokens per forward pass on one worker, padding included; given, it rules instead of `micro_batch_size`. A step then takes as
    few passes as that allows, of samples of similar length where they are padded. A longer sample goes alone."""
    eval_every: int = Field(50, ge=1)
    """Optimizer steps between evaluations on the held-out part (always once before and after)."""
    save_every: int = Field(200, ge=1)
    """Optimizer steps between checkpoints."""
    keep_checkpoints: int = Field(2, ge=1)
    """Newest checkpoints that stay; an older one goes after a newer one is complete."""
    log_every: int = Field(10, ge=1)
    """Optimizer steps between logged points."""
    keep_best: bool = False
    """Leave the model of the evaluation with the lowest held-out loss, not of the last step."""
    patience: int | None = Field(None, ge=1)
    """Stop early after this many evaluations in a row without a lower held-out loss."""
    freeze_layers: int = Field(0, ge=0)
    """Freeze the embeddings and this many layers above them."""
    lora: AdapterConfig | None = None
    """Train low-rank adapters instead of the weights of the trunk."""
    residual_dropout: float = Field(0.0, ge=0, lt=1)
    """Probability of dropping each element that attention and MLP add to the residual stream."""
    residual_dropout_lima: bool = False
    """Let that probability rise linearly, from 0 in the lowest layer to `residual_dropout` in the highest."""
    optimizer: OptimizerConfig = OptimizerConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    workers: WorkersConfig = WorkersConfig()

    @model_validator(mode="after")
    def _batch_divides(self) -> TrainingConfig:
        micro = 1 if self.micro_batch_tokens else self.micro_batch_size
        if self.batch_size % (micro * self.workers.count):
            raise ValueError(
                f"batch_size = {self.batch_size} is no multiple of micro_batch_size x workers.count = "
                f"{micro} x {self.workers.count}: choose a multiple of {micro * self.workers.count}"
            )
        require_one_way(self)
        return self

    @property
    def accumulation(self) -> int:
        """Micro-batches per optimizer step on each worker; at most, where tokens are counted."""
        if self.micro_batch_tokens:
            return self.batch_size // self.workers.count
        return self.batch_size // (self.micro_batch_size * self.workers.count)


class SftConfig(TrainingConfig):
    """Supervised fine-tuning on assistant turns."""

    packing: bool = True
    """Put the threads of a micro-batch behind each other in one row, without padding, each attending to itself alone. Models whose
    layers need more than a causal mask get one padded row per thread all the same."""
    poly_eps: float = Field(0.0, ge=0)
    """PolyLoss: adds this times (1 - p) to each target token's cross-entropy; held-out losses stay plain."""


class RewardModelConfig(TrainingConfig):
    """Bradley-Terry training over ranked groups."""

    max_replies: int = Field(5, ge=2)
    """Replies per group; the best-ranked ones are kept."""
    loss: Literal["group", "pairs"] = "group"
    """What weighs the same: every group (mean over its pairs, then over groups), or every pair of an optimizer step."""
    margin: float = Field(0.0, ge=0)
    """Lead that the loss asks of a reply over the one ranked next, and twice as much over the one after that."""
    score_l2: float = Field(0.001, ge=0)
    """Weight of the squared scores in the loss, which keeps them near 0."""
    pooling: Literal["last", "mean"] = "last"
    """What a score is read from: the last token, or the mean over all tokens. Plain transformers reads the last token of either."""
    share_prefix: bool | None = None
    """Compute the tokens that all replies of a group begin with once; not given: on CPUs. Other scores and gradients it does not make."""
    offset_samples: int = Field(128, ge=1)
    """Answers of the SFT model whose mean score becomes `reward_offset` (of a model that writes none: training groups)."""
