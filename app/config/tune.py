"""Hyperparameter search over PPO."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from app.schema import Config


class Uniform(Config):
    type: Literal["uniform", "loguniform"]
    low: float
    high: float

    @model_validator(mode="after")
    def _not_empty(self) -> Uniform:
        if not self.low < self.high or (self.type == "loguniform" and self.low <= 0):
            raise ValueError(f"empty range: low = {self.low}, high = {self.high}")
        return self


class Choice(Config):
    type: Literal["choice"]
    values: tuple[Any, ...] = Field(min_length=1)


Domain = Annotated[Uniform | Choice, Field(discriminator="type")]


class TuneConfig(Config):
    """Trials of `corral tune`; every trial is one PPO run, all share one scoring service."""

    trials: int = Field(4, ge=1)
    """How many configurations to try."""
    concurrent: int = Field(1, ge=1)
    """Trials at a time."""
    space: dict[str, Domain] = Field(default_factory=dict)
    """Dotted config key -> domain, for example `"ppo.kl.coef" = {type = "loguniform", low = 0.01, high = 0.2}`."""
    kl_price: float = Field(0.05, ge=0)
    """What a trial's objective pays per nat of KL to the reference, whatever its own ppo.kl.coef: mean score - kl_price x KL."""
    window: int = Field(3, ge=1)
    """The objective is averaged over this many last steps."""
    grace_steps: int = Field(4, ge=1)
    """ASHA: steps before a trial may be stopped."""
    reduction: int = Field(2, ge=2)
    """ASHA: one in `reduction` trials goes on past each rung."""
