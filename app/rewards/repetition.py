"""A penalty on responses that repeat themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from app.experience import IntArray
from app.rewards.part import RulePart, Sample


class RepetitionReward(RulePart):
    """-(share of the response's n-grams of tokens that occurred in it before): 0 where all differ."""

    type: Literal["repetition"]
    ngram: int = Field(4, ge=1)
    """Tokens per n-gram."""

    def score(self, samples: Sequence[Sample]) -> list[float]:
        """One penalty in (-1, 0] per sample."""
        return [-repeated_share(sample.ids, self.ngram) for sample in samples]


def repeated_share(ids: IntArray | Sequence[int], ngram: int) -> float:
    """Share of n-grams that occurred before; 0 for a sequence without any n-gram.

    >>> repeated_share([1, 2, 1, 2, 1], 2)
    0.5
    """
    grams = list(zip(*(ids[start:].tolist() if not isinstance(ids, Sequence) else ids[start:] for start in range(ngram)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
