"""Scores of rollouts against those of the reference answers to their prompts, and shaped.

Shape legend: B rollouts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from app.algorithms.shaping import RewardShapingConfig, shape_scores
from app.experience import FinishReason, Prompt, Rollout, Scores
from app.interfaces import Pending, Reward
from app.numerics import Moments


@dataclass(frozen=True)
class Baselines:
    """Scores of the reference answers to prompts. names: ids of the prompts, in the order of the scores."""

    names: Sequence[str]
    scores: Scores

    def by_prompt(self) -> Mapping[str, float]:
        return dict(zip(self.names, self.scores.total_B.tolist(), strict=True))


@dataclass(frozen=True)
class _PendingBaselines:
    names: Sequence[str]
    scores: Pending[Scores]

    def result(self) -> Baselines:
        return Baselines(self.names, self.scores.result())


def reference_scores(reward: Reward, rollouts: Sequence[Rollout]) -> Pending[Baselines] | None:
    """Start scoring the reference answers of the batch's prompts, each once. None where no prompt has one."""
    prompts = {rollout.prompt.id: rollout.prompt for rollout in rollouts if rollout.prompt.reference is not None}
    return _PendingBaselines(list(prompts), reward.score([reference_rollout(p) for p in prompts.values()])) if prompts else None


def reference_rollout(prompt: Prompt) -> Rollout:
    """The reference answer of a prompt as if it had been sampled, for a reward to score. Raises ValueError without one."""
    if prompt.reference is None:
        raise ValueError(f"prompt {prompt.id} has no reference answer")
    length = len(prompt.reference)
    return Rollout(prompt, 0, prompt.reference, np.zeros(length, np.float32), FinishReason.STOP, np.zeros(length, np.int32))


def shape_rollout_scores(
    scores_B: torch.Tensor,
    baselines: Baselines | None,
    rollouts: Sequence[Rollout],
    moments: Moments,
    config: RewardShapingConfig,
    max_new_tokens: int,
) -> tuple[torch.Tensor, Moments]:
    """See `shape_scores`."""
    known = baselines.by_prompt() if baselines else {}
    return shape_scores(
        scores_B,
        config,
        moments,
        baselines_B=torch.tensor([known.get(rollout.prompt.id, 0.0) for rollout in rollouts]),
        has_baseline_B=torch.tensor([rollout.prompt.id in known for rollout in rollouts]),
        finished_B=torch.tensor([rollout.finish is FinishReason.STOP for rollout in rollouts]),
        lengths_B=torch.tensor([len(rollout.ids) for rollout in rollouts]),
        max_length=max_new_tokens,
    )
