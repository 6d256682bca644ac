"""Proximal policy optimisation with a critic.

Shape legend: B rows, T response tokens.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from app.algorithms.algorithm import Algorithm, as_floats
from app.experience import Experience, Loss, Minibatch, PolicyOutputs, Totals
from app.numerics.advantages import generalized_advantages
from app.numerics.masked import whiten
from app.numerics.policy_loss import clipped_value_loss
from app.schema import Config


class PpoOptions(Config):
    """GAE on a critic's values, clipped value loss (Schulman et al. 2017; defaults of Huang et al. 2024)."""

    gamma: float = Field(1.0, gt=0, le=1)
    """Discount per token."""
    lam: float = Field(0.95, ge=0, le=1)
    """GAE lambda."""
    value_clip: float | None = Field(0.2, gt=0)
    """Values may move this far from the old ones before the loss stops following; null turns it off."""
    value_coef: float = Field(0.1, ge=0)
    """Weight of the value loss."""
    whiten_advantages: bool = True
    """Shift and scale advantages to mean 0 and variance 1 over all response tokens of the batch."""


class Ppo(Algorithm[PpoOptions]):
    """PPO as Huang et al. 2024 (https://arxiv.org/abs/2403.17031) run it on language models."""

    options = PpoOptions
    has_critic: ClassVar[bool] = True

    def advantages(self, experience: Experience, rewards_BT: torch.Tensor) -> torch.Tensor:
        """GAE on the critic's values; the value behind the last token is 0. Raises ValueError without values."""
        if experience.values_BT is None:
            raise ValueError("PPO reads the critic's values, and the experience has none: take them from Learner.inspect")
        config = self.config
        return generalized_advantages(rewards_BT, experience.values_BT, experience.mask_BT, gamma=config.gamma, lam=config.lam)

    def normalised(self, advantages_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
        """Whitened over all response tokens of the batch, where asked for."""
        return whiten(advantages_BT, mask_BT) if self.config.whiten_advantages else advantages_BT

    def loss(self, outputs: PolicyOutputs, minibatch: Minibatch, totals: Totals) -> Loss:
        """With the value loss, which includes value_coef; metrics also hold value_loss (without it) and value_clip_fraction."""
        if outputs.values_BT is None or minibatch.old_values_BT is None:
            raise ValueError("PPO needs the critic's values, old and new")
        policy, metrics = self.surrogate.loss(outputs, minibatch, totals)
        value = clipped_value_loss(
            outputs.values_BT,
            minibatch.old_values_BT,
            minibatch.returns_BT,
            minibatch.mask_BT,
            clip=self.config.value_clip,
            total_tokens=max(1, totals.tokens),
        )
        metrics |= {"value_loss": value.loss.detach(), "value_clip_fraction": value.clip_fraction}
        return Loss(policy=policy, value=self.config.value_coef * value.loss, metrics=as_floats(metrics))
