"""Which prompts a PPO step uses: a function of seed and cursor alone, so a resumed run goes on with the same prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from app.data.mixture import Mixture
from app.experience import Prompt


@dataclass(frozen=True)
class PromptStream:
    """An endless stream of prompts, mixed as `mixture` says."""

    prompts: Sequence[Prompt]
    mixture: Mixture

    @classmethod
    def over(cls, prompts: Sequence[Prompt]) -> PromptStream:
        """Each pass takes every prompt once, in a fresh order."""
        return cls(prompts, Mixture.of([""] * len(prompts), {}))

    def take(self, cursor: int, count: int, *, seed: int) -> list[Prompt]:
        """`count` prompts from position `cursor`."""
        return [self.prompts[i] for i in self.mixture.rows(cursor, count, seed=seed)]
