"""Intervals for comparing two models on the same prompts. Percentile bootstrap (Efron 1979); every function is deterministic by seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLED_VALUES = 4_000_000  # values drawn at a time, which bounds the memory at 32 MB of indices


@dataclass(frozen=True)
class Interval:
    """A mean and its confidence interval, in the units of what was averaged."""

    mean: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        """Exactly `{"mean": ..., "low": ..., "high": ...}`, as it stands in summary.json."""
        return asdict(self)


def mean_interval(values: ArrayLike, resamples: int, seed: int, level: float = 0.95) -> Interval:
    """Mean of `values` [n] with the percentile interval of `resamples` means of n values drawn with replacement.

    Raises ValueError for no values and for values that are not finite.
    """
    values_n = np.asarray(values, dtype=np.float64)
    if values_n.ndim != 1 or not len(values_n):
        raise ValueError(f"an interval needs a non-empty list of numbers, got shape {values_n.shape}")
    if not np.isfinite(values_n).all():
        raise ValueError(f"{int((~np.isfinite(values_n)).sum())} of {len(values_n)} values are not finite: drop or mend them first")
    means_r = _resampled_means(values_n, resamples, np.random.default_rng(seed))
    low, high = np.quantile(means_r, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values_n.mean()), float(low), float(high))


def _resampled_means(values_n: NDArray[np.float64], resamples: int, rng: np.random.Generator) -> NDArray[np.float64]:
    count = len(values_n)
    rows = max(1, RESAMPLED_VALUES // count)
    blocks = [min(rows, resamples - start) for start in range(0, resamples, rows)]
    return np.concatenate([values_n[rng.integers(count, size=(block, count))].mean(axis=1) for block in blocks])


def paired_bootstrap(deltas: ArrayLike, resamples: int, seed: int) -> Interval:
    """95 % interval of a mean paired difference. `deltas` [n]: after - before, one per prompt.

    Resampling prompts (not the two sides apart) keeps each pair together, so that easy and hard prompts cancel out.
    """
    return mean_interval(deltas, resamples, seed)


def win_rate(a: Sequence[float], b: Sequence[float], resamples: int, seed: int) -> Interval:
    """How often `a` [n] is above `b` [n], prompt by prompt, ties counting half; with its 95 % interval. 0.5 is no difference."""
    a_n, b_n = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a_n.shape != b_n.shape:
        raise ValueError(f"a win rate compares pairs: got {a_n.shape} and {b_n.shape} values")
    if not (np.isfinite(a_n).all() and np.isfinite(b_n).all()):
        raise ValueError("a win rate needs finite values on both sides: drop or mend the others first")
    return mean_interval((a_n > b_n) + 0.5 * (a_n == b_n), resamples, seed)
