"""Mean and variance of numbers that come in batches."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Moments:
    """count: numbers seen; mean: theirs; squares: sum of squared distances from the mean."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def updated(self, x: torch.Tensor) -> Moments:
        """With the numbers of `x` (any shape) added; NaN and infinite ones are not seen.

        Source: Chan et al. 1979, the pairwise update of sums of squares.

        >>> Moments().updated(torch.tensor([1.0, 3.0])).updated(torch.tensor([5.0, math.nan]))
        Moments(count=3, mean=3.0, squares=8.0)
        """
        x = x[x.isfinite()].double()
        if not x.numel():
            return self
        count, mean = x.numel(), float(x.mean())
        total = self.count + count
        apart = mean - self.mean
        squares = self.squares + float(((x - mean) ** 2).sum()) + apart**2 * self.count * count / total
        return Moments(total, self.mean + apart * count / total, squares)

    @property
    def std(self) -> float:
        """Population standard deviation; 0 before anything was seen."""
        return math.sqrt(self.squares / self.count) if self.count else 0.0
