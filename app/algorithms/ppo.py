"""Proximal policy optimisation with a critic.

Shape legend: B rows, T response tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from pydantic import Field

from app.algorithms.credit import check_finite, mask_failed_rows
from app.experience import Experience, Loss, Minibatch, PolicyOutputs, Totals
from app.numerics.advantages import generalized_advantages
from app.numerics.kl import k3
from app.numerics.masked import masked_sum, whiten, zero_masked
from app.numerics.policy_loss import clipped_policy_loss, clipped_value_loss, ratios, truncated_importance
from app.numerics.rewards import token_rewards
from app.schema import Config


class PpoConfig(Config):
    """Clipped policy and value losses over GAE advantages (Schulman et al. 2017; defaults of Huang et al. 2024)."""

    gamma: float = Field(1.0, gt=0, le=1)
    """Discount per token."""
    lam: float = Field(0.95, ge=0, le=1)
    """GAE lambda."""
    clip: float = Field(0.2, gt=0, lt=1)
    """The ratio current / proximal is clipped to [1 - clip, 1 + clip]."""
    value_clip: float | None = Field(0.2, gt=0)
    """Values may move this far from the old ones before the loss stops following; null turns it off."""
    value_coef: float = Field(0.1, ge=0)
    """Weight of the value loss."""
    whiten_advantages: bool = True
    """Shift and scale advantages to mean 0 and variance 1 over all response tokens of the batch."""
    max_importance: float = Field(2.0, gt=0)
    """With ppo.max_lag > 0 each token's policy loss is weighted by min(proximal / behaviour, max_importance)."""


@dataclass(frozen=True)
class Ppo:
    """PPO as Huang et al. 2024 (https://arxiv.org/abs/2403.17031) run it on language models."""

    config: PpoConfig

    def credit(self, experience: Experience, *, kl_coef: float) -> Experience:
        """The batch with rewards, advantages and returns. Give it the *whole* batch, before it is split over ranks.

        In this order: rows whose score is NaN are masked out; rewards are -kl_coef * (proximal - reference) per token
        plus the score at the last one; GAE on the critic's values; returns = advantage + old value; advantages are then
        whitened over all response tokens. scores_B are taken as they are (see `shape_scores`).
        Totals of a step must be counted from the mask of what this returns. Raises NonFiniteError.
        """
        config = self.config
        experience = mask_failed_rows(experience)
        check_finite(experience)
        mask_BT = experience.mask_BT
        rewards_BT = token_rewards(experience.scores_B, experience.proximal_BT, experience.reference_BT, mask_BT, kl_coef=kl_coef)
        advantages_BT = generalized_advantages(rewards_BT, experience.values_BT, mask_BT, gamma=config.gamma, lam=config.lam)
        returns_BT = zero_masked(advantages_BT + experience.values_BT, mask_BT)
        if config.whiten_advantages:
            advantages_BT = whiten(advantages_BT, mask_BT)
        return replace(experience, rewards_BT=rewards_BT, advantages_BT=advantages_BT, returns_BT=returns_BT)

    def loss(self, outputs: PolicyOutputs, minibatch: Minibatch, totals: Totals, *, max_lag: int) -> Loss:
        """Losses and metrics of one micro-batch, each a sum over its tokens divided by `totals.tokens`.

        The policy's ratio is current / proximal; with max_lag > 0 each token's loss is also multiplied by the detached
        min(proximal / behaviour, max_importance). The value loss includes value_coef; it is None where outputs have no
        values. Metrics add up over micro-batches and ranks to means over the step's response tokens:
        policy_loss, clip_fraction, approx_kl (k3 of proximal against current), ratio_mean, entropy, with a critic
        value_loss (without value_coef) and value_clip_fraction, with max_lag > 0 importance_mean.
        """
        config = self.config
        mask_BT = minibatch.mask_BT
        # A step whose every row failed has no tokens: its sums are 0, and so are its losses.
        total_tokens = max(1, totals.tokens)
        weights_BT = None
        if max_lag > 0:
            weights_BT = truncated_importance(minibatch.proximal_BT, minibatch.behaviour_BT, mask_BT, maximum=config.max_importance)
        policy = clipped_policy_loss(
            outputs.logprobs_BT,
            minibatch.proximal_BT,
            minibatch.advantages_BT,
            mask_BT,
            clip=config.clip,
            total_tokens=total_tokens,
            weights_BT=weights_BT,
        )
        current_BT = outputs.logprobs_BT.detach()
        metrics = {
            "policy_loss": policy.loss.detach(),
            "clip_fraction": policy.clip_fraction,
            "approx_kl": masked_sum(k3(minibatch.proximal_BT, current_BT), mask_BT) / total_tokens,
            "ratio_mean": masked_sum(ratios(current_BT, minibatch.proximal_BT, mask_BT), mask_BT) / total_tokens,
            "entropy": masked_sum(outputs.entropy_BT.detach(), mask_BT) / total_tokens,
        }
        if weights_BT is not None:
            metrics["importance_mean"] = masked_sum(weights_BT, mask_BT) / total_tokens
        value_loss = None
        if outputs.values_BT is not None:
            value = clipped_value_loss(
                outputs.values_BT,
                minibatch.old_values_BT,
                minibatch.returns_BT,
                mask_BT,
                clip=config.value_clip,
                total_tokens=total_tokens,
            )
            value_loss = config.value_coef * value.loss
            metrics |= {"value_loss": value.loss.detach(), "value_clip_fraction": value.clip_fraction}
        return Loss(policy=policy.loss, value=value_loss, metrics=_as_floats(metrics))


def _as_floats(metrics: dict[str, torch.Tensor]) -> dict[str, float]:
    # One transfer from the accelerator instead of one per metric.
    return dict(zip(metrics, torch.stack([x.float() for x in metrics.values()]).tolist(), strict=True))
