"""REINFORCE++: rewards to go, normalised over the whole batch. No critic.

Shape legend: B rows, T response tokens.
"""

from __future__ import annotations

import torch
from pydantic import Field

from app.algorithms.algorithm import Algorithm, groups_of
from app.experience import Experience
from app.numerics.advantages import generalized_advantages
from app.numerics.groups import group_means
from app.numerics.masked import whiten
from app.numerics.rewards import last_true
from app.schema import Config


class ReinforcePpOptions(Config):
    """Rewards to go, whitened over the batch (Hu 2025)."""

    gamma: float = Field(1.0, gt=0, le=1)
    """Discount per token."""
    group_baseline: bool = False
    """Subtract from each score the mean over the samples of its prompt (needs ppo.samples_per_prompt of 2 or more)."""


class ReinforcePp(Algorithm[ReinforcePpOptions]):
    """REINFORCE++ of Hu 2025, https://arxiv.org/abs/2501.03262: A_t = sum_{k >= t} gamma^(k - t) r_k, then whitened.

    r is the score at the last token and -kl_coef * k1 on every token. One sample of a prompt is enough.
    """

    options = ReinforcePpOptions

    @property
    def compares_samples(self) -> bool:
        return self.config.group_baseline

    def advantages(self, experience: Experience, rewards_BT: torch.Tensor) -> torch.Tensor:
        """Discounted sums of the rewards from each token on, [B, T]. Raises ValueError where a baseline is asked for without groups."""
        mask_BT = experience.mask_BT
        if self.config.group_baseline:
            baseline_B = group_means(experience.scores_B, groups_of(experience), mask_BT.any(dim=1))
            rewards_BT = rewards_BT - torch.where(last_true(mask_BT), baseline_B[:, None], 0.0)
        return generalized_advantages(rewards_BT, torch.zeros_like(rewards_BT), mask_BT, gamma=self.config.gamma, lam=1.0)

    def normalised(self, advantages_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
        """Whitened over all response tokens of the batch."""
        return whiten(advantages_BT, mask_BT)
