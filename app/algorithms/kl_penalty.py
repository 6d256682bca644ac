"""The penalty on the policy's distance from the reference: where it stands, and how heavy it is."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from app.algorithms.algorithm import KlPlace
from app.algorithms.surrogate import KlForm
from app.numerics.kl import adapted_coefficient
from app.schema import Config


class KlConfig(Config):
    """KL penalty against the reference policy."""

    coef: float = Field(0.05, ge=0)
    """Weight of the penalty; with an adaptive controller, the one to begin with."""
    place: KlPlace | None = None
    """`reward`: -coef x k1 on each token's reward; `loss`: coef x the mean of loss_form in the policy loss; `both`: twice, on purpose.
    null: where the algorithm has it, grpo in the loss, the others in the reward."""
    loss_form: KlForm = "k3"
    """Estimator in the loss: k2 has the gradient of KL(policy || reference), k3 that of KL(reference || policy)."""
    controller: Literal["fixed", "adaptive"] = "fixed"
    """`adaptive` steers coef after every batch so that the KL per sequence comes to `target`."""
    target: float | None = Field(None, gt=0)
    """With an adaptive controller: KL to reach, nats per sequence (the mean of the k1 summed over its tokens)."""
    horizon: float = Field(10_000, gt=0)
    """With an adaptive controller: sequences over which coef changes by at most 20 percent."""

    @model_validator(mode="after")
    def _controller_can_steer(self) -> KlConfig:
        if self.controller == "adaptive" and self.target is None:
            raise ValueError("controller = adaptive has no target: set target, nats per sequence such as 6, or controller = fixed")
        if self.controller == "adaptive" and not self.coef:
            raise ValueError("controller = adaptive multiplies coef, which is 0 and stays so: set coef above 0, or controller = fixed")
        if self.controller == "fixed" and self.target is not None:
            raise ValueError(
                f"target = {self.target:g} is read by an adaptive controller only: set controller = adaptive, or target = null"
            )
        return self

    def after(self, coef: float, *, kl: float, sequences: int) -> float:
        """The coefficient of the next batch, after one of `sequences` rollouts whose mean KL per sequence was `kl`."""
        if self.target is None:
            return coef
        return adapted_coefficient(coef, kl, target=self.target, horizon=self.horizon, sequences=sequences)
