"""From scores to what is added at the last response token: options, order and running scale.

Shape legend: B rollouts.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator

from app.numerics.moments import Moments
from app.numerics.rewards import above_baseline, clip_scores, length_penalties, penalise_missing_eos
from app.schema import Config


class RewardShapingConfig(Config):
    """From score (the reward model's logit minus its offset) to the reward at the last token, in this order."""

    delta: bool = False
    """Subtract the score of the prompt's reference answer, where the data has one: its best reply, or the turn that followed."""
    scale: Literal["running", "reference"] | None = None
    """Divide by a standard deviation: `running`, of all scores of the run so far; `reference`, of the first batch, which the policy
    sampled as it began (of all up to the first score that differs from the others), or reference_std. The mean is not subtracted."""
    reference_std: float | None = Field(None, gt=0)
    """Standard deviation of the scores of the reference policy's answers, where it is known."""
    clip: float | None = Field(None, gt=0)
    """Clip scores to [-clip, clip]."""
    missing_eos_score: float | None = -1.0
    """Score of a response that ran into the token limit (never above its own score); null leaves it alone."""
    missing_eos_penalty: float = Field(0.0, ge=0)
    """Instead, with missing_eos_score = null: what a response that ran into the token limit loses."""
    length_penalty: float = Field(0.0, ge=0)
    """What a response loses per token."""
    overlong_buffer: int | None = Field(None, ge=1)
    """The last tokens before rollout.max_new_tokens, over which overlong_penalty rises from 0; null turns it off."""
    overlong_penalty: float = Field(1.0, gt=0)
    """What a response of rollout.max_new_tokens tokens loses with overlong_buffer."""

    @model_validator(mode="after")
    def _says_one_thing(self) -> RewardShapingConfig:
        if self.missing_eos_penalty and self.missing_eos_score is not None:
            raise ValueError(
                f"missing_eos_score = {self.missing_eos_score:g} replaces the score that missing_eos_penalty = "
                f"{self.missing_eos_penalty:g} lowers: set missing_eos_score = null, or missing_eos_penalty = 0"
            )
        if self.reference_std is not None and self.scale != "reference":
            raise ValueError("reference_std is read with scale = reference only: set it, or reference_std = null")
        return self


def shape_scores(
    scores_B: torch.Tensor,
    config: RewardShapingConfig,
    moments: Moments,
    *,
    baselines_B: torch.Tensor,
    has_baseline_B: torch.Tensor,
    finished_B: torch.Tensor,
    lengths_B: torch.Tensor,
    max_length: int,
) -> tuple[torch.Tensor, Moments]:
    """Shaped scores [B], and the moments to go on with: those of the unscaled scores, which `scale` divides by.

    In this order: - score of the reference answer (baselines_B, where has_baseline_B), / scale, clip, missing-EOS, length terms.
    A failed score (NaN) stays NaN; one that failed on the reference answer is none either. finished_B: bool, True where the end
    token was sampled; lengths_B: response tokens; max_length: the token limit of a response.
    """
    if config.delta:
        scores_B = above_baseline(scores_B, baselines_B, has_baseline_B)
    if config.scale == "running" or (config.scale == "reference" and not moments.std):
        moments = moments.updated(scores_B)
    shaped_B = clip_scores(scores_B / scale_of(config, moments), config.clip)
    shaped_B = penalise_missing_eos(
        shaped_B, finished_B, replacement=config.missing_eos_score, penalty=config.missing_eos_penalty
    ) - length_penalties(
        lengths_B,
        per_token=config.length_penalty,
        overlong_buffer=config.overlong_buffer,
        overlong_penalty=config.overlong_penalty,
        max_length=max_length,
    )
    return shaped_B, moments


def scale_of(config: RewardShapingConfig, moments: Moments) -> float:
    """What scores are divided by; 1 where nothing is asked for, or all scores so far are the same."""
    if config.scale is None:
        return 1.0
    return config.reference_std or moments.std or 1.0
