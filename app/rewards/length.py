"""A reward for answers of a wanted length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from app.rewards.part import RulePart, Sample


class LengthReward(RulePart):
    """0 between `minimum` and `maximum` response tokens; outside, falling to -1 over `slack` tokens, and -1 beyond."""

    type: Literal["length"]
    minimum: int = Field(0, ge=0)
    """Shortest response without a penalty, tokens (the end token counts)."""
    maximum: int = Field(ge=1)
    """Longest response without a penalty, tokens."""
    slack: int = Field(1, ge=1)
    """Tokens over which the penalty grows from 0 to 1."""

    @model_validator(mode="after")
    def _not_empty(self) -> LengthReward:
        if self.minimum > self.maximum:
            raise ValueError(f"minimum = {self.minimum} is above maximum = {self.maximum}: exchange them")
        return self

    def score(self, samples: Sequence[Sample]) -> list[float]:
        """One penalty per sample."""
        return [-min(1.0, self._outside(len(sample.ids)) / self.slack) for sample in samples]

    def _outside(self, length: int) -> int:
        return max(0, self.minimum - length, length - self.maximum)
