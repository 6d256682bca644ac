"""The policy loss that every algorithm descends: PPO's clipped surrogate, with a KL penalty and an entropy bonus where asked for.

Shape legend: b rows of a micro-batch, t response tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field

from app.experience import Minibatch, PolicyOutputs, Totals
from app.numerics.kl import k2, k3
from app.numerics.masked import masked_sum, zero_masked
from app.numerics.policy_loss import clipped_policy_loss, ratios, sequence_weights, truncated_importance
from app.schema import Config

KlForm = Literal["k2", "k3"]
KL_FORMS = {"k2": k2, "k3": k3}


class SurrogateConfig(Config):
    """The clipped policy loss, the same for all algorithms."""

    clip: float = Field(0.2, gt=0, lt=1)
    """The ratio current / proximal is clipped from below at 1 - clip, and from above at 1 + clip where clip_high is null."""
    clip_high: float | None = Field(None, gt=0)
    """Another bound from above, 1 + clip_high (`clip higher` is 0.28); null is the same as clip."""
    dual_clip: float | None = Field(None, gt=1)
    """Where the advantage is negative the ratio counts as at most this (3 is usual); null leaves it unbounded."""
    entropy_coef: float = Field(0.0, ge=0)
    """Weight of the mean entropy per token, which is subtracted from the loss."""
    max_importance: float | None = Field(2.0, gt=0)
    """With ppo.max_lag > 0 each token's policy loss is weighted by min(proximal / behaviour, max_importance), and a KL penalty in the loss
    by min(current / behaviour, max_importance); with max_lag = 0 only the penalty, by min(current / proximal, max_importance). null: no
    upper bound, which only max_lag = 0 allows."""


@dataclass(frozen=True)
class Surrogate:
    """max_lag: as in the loop. kl_in_reward: the penalty is a part of the rewards. kl_in_loss: its form in the loss; None: not there.

    The weight of the penalty comes with each batch (`kl_coef`), since a controller may change it.
    """

    config: SurrogateConfig = SurrogateConfig()
    max_lag: int = 0
    kl_in_reward: bool = True
    kl_in_loss: KlForm | None = None

    def loss(
        self, outputs: PolicyOutputs, minibatch: Minibatch, totals: Totals, *, per_sequence: bool = False
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Policy loss and metrics of one micro-batch, each a sum over its tokens divided by `totals.tokens`:

            policy_loss + kl_coef * kl_loss - entropy_coef * entropy

        policy_loss: the clipped surrogate; with max_lag > 0 each token's is multiplied by the detached min(proximal / behaviour, C).
        kl_loss (with kl_in_loss): k2 or k3 of current against reference, each token's multiplied by the detached
        min(current / proximal, C), or min(current / behaviour, C) with max_lag > 0, since the tokens are not drawn from the current
        policy; C = max_importance. See app.numerics.kl for what each form descends.
        per_sequence: the mean over sequences of means over their tokens, instead of the mean over all tokens, for all three.

        Metrics add up over micro-batches and ranks to means over the step's response tokens: those above, clip_fraction,
        approx_kl (k3 of proximal against current), ratio_mean, with max_lag > 0 importance_mean.
        """
        config, mask_BT = self.config, minibatch.mask_BT
        # A step whose every row failed has no tokens: its sums are 0, and so are its losses.
        total_tokens = max(1, totals.tokens)
        share_BT = torch.ones_like(outputs.logprobs_BT)
        if per_sequence:
            share_BT = sequence_weights(mask_BT, total_tokens=total_tokens, total_sequences=totals.sequences, dtype=share_BT.dtype)
        importance_BT = self._importance(minibatch.proximal_BT, minibatch)
        policy = clipped_policy_loss(
            outputs.logprobs_BT,
            minibatch.proximal_BT,
            minibatch.advantages_BT,
            mask_BT,
            clip=config.clip,
            clip_high=config.clip_high,
            dual_clip=config.dual_clip,
            total_tokens=total_tokens,
            weights_BT=share_BT if importance_BT is None else share_BT * importance_BT,
        )

        def mean(x_BT: torch.Tensor) -> torch.Tensor:
            return masked_sum(share_BT * x_BT, mask_BT) / total_tokens

        current_BT = outputs.logprobs_BT.detach()
        metrics = {
            "policy_loss": policy.loss.detach(),
            "clip_fraction": policy.clip_fraction,
            "approx_kl": masked_sum(k3(minibatch.proximal_BT, current_BT), mask_BT) / total_tokens,
            "ratio_mean": masked_sum(ratios(current_BT, minibatch.proximal_BT, mask_BT), mask_BT) / total_tokens,
            "entropy": masked_sum(outputs.entropy_BT.detach(), mask_BT) / total_tokens,
        }
        loss = policy.loss
        if importance_BT is not None:
            metrics["importance_mean"] = masked_sum(importance_BT, mask_BT) / total_tokens
        if self.kl_in_loss is not None:
            kl_loss = mean(self._kl_loss(outputs.logprobs_BT, minibatch, self.kl_in_loss))
            loss = loss + minibatch.kl_coef * kl_loss
            metrics["kl_loss"] = kl_loss.detach()
        if config.entropy_coef:
            loss = loss - config.entropy_coef * mean(outputs.entropy_BT)
        return loss, metrics

    def _importance(self, numerator_BT: torch.Tensor, minibatch: Minibatch) -> torch.Tensor | None:
        """min(numerator / behaviour, C), detached; None where the rollouts are of the proximal policy itself."""
        if self.max_lag == 0 or self.config.max_importance is None:
            return None
        return truncated_importance(numerator_BT, minibatch.behaviour_BT, minibatch.mask_BT, maximum=self.config.max_importance)

    def _kl_loss(self, logprobs_BT: torch.Tensor, minibatch: Minibatch, form: KlForm) -> torch.Tensor:
        mask_BT = minibatch.mask_BT
        weights_BT = self._importance(logprobs_BT, minibatch)
        if weights_BT is None:
            maximum = self.config.max_importance or torch.inf
            weights_BT = truncated_importance(logprobs_BT, minibatch.proximal_BT, mask_BT, maximum=maximum)
        # Masked before the square or the exponential: their gradients multiply, and 0 * NaN is NaN.
        current_BT, reference_BT = zero_masked(logprobs_BT, mask_BT), zero_masked(minibatch.reference_BT, mask_BT)
        return weights_BT * KL_FORMS[form](current_BT, reference_BT)
