"""Proximal policy optimisation with a critic."""

from __future__ import annotations

from pydantic import Field

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
