"""Which searched keys the objective depends on.

The importance of a key is the adjusted share of the variance (R squared) of the objective's rank that the key explains alone: a
parabola in the rank of a number, so that an optimum in the middle counts, and a level for each value of a category. Ranks, because
trials that were stopped or diverged have objectives on no common scale. Beside it stands what chance alone reaches: the 95th
percentile over random permutations of the objectives, without which a handful of trials makes any key look important.

Shape legend: N trials, D permutations, P columns that describe a key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from app.experience import DoubleArray
from app.search.records import BROKEN, UNTRIED
from app.search.results import Search, Trial, is_numeric

PERMUTATIONS = 2000
CHANCE = 0.95


@dataclass(frozen=True)
class Importance:
    """share: adjusted R squared, at least 0; chance: what 95 % of random orders stay below; trials: how many have the key.
    Both are None where too few trials, or only one value, say nothing."""

    key: str
    trials: int
    share: float | None = None
    chance: float | None = None

    @property
    def certain(self) -> bool:
        """Whether it is more than chance."""
        return self.share is not None and self.chance is not None and self.share > self.chance


def importances(search: Search) -> list[Importance]:
    """Of every searched key, the most important first. Trials that broke share the lowest rank; the untried are left out."""
    found = [_importance(search.trials, key) for key in search.keys]
    return sorted(found, key=lambda one: -1.0 if one.share is None else one.share, reverse=True)


def _importance(trials: Sequence[Trial], key: str) -> Importance:
    used = [trial for trial in trials if trial.config.get(key) is not None and _outcome(trial) is not None]
    count = len(used)
    if not used:
        return Importance(key, 0)
    y_N = ranks([float(_outcome(trial) or 0.0) for trial in used])
    x_NP = describe([trial.config[key] for trial in used])
    y_N = y_N - y_N.mean()
    free = count - x_NP.shape[1] - 1
    if not x_NP.shape[1] or free < 1 or not y_N.any():
        return Importance(key, count)
    basis_NP, _ = np.linalg.qr(x_NP)
    orders_DN = np.random.default_rng(0).permuted(np.tile(y_N, (PERMUTATIONS, 1)), axis=1)
    explained_D = ((np.vstack([y_N, orders_DN]) @ basis_NP) ** 2).sum(1) / (y_N**2).sum()
    share_D = np.maximum(0.0, 1 - (1 - explained_D) * (count - 1) / free)
    return Importance(key, count, float(share_D[0]), float(np.quantile(share_D[1:], CHANCE)))


def _outcome(trial: Trial) -> float | None:
    """What a trial is ranked by; None for one that says nothing."""
    if trial.status in BROKEN:
        return -np.inf
    return None if trial.status in UNTRIED else trial.objective


def ranks(values: Sequence[float]) -> DoubleArray:
    """0, 1, ... from the lowest value; equal values share the mean of their ranks.

    >>> ranks([3.0, 1.0, 3.0]).tolist()
    [1.5, 0.0, 1.5]
    """
    _, place_N, counts = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True)
    return np.asarray((counts.cumsum() - (counts + 1) / 2)[place_N], dtype=np.float64)


def describe(values: Sequence[Any]) -> DoubleArray:
    """Centred, linearly independent columns [N, P] that stand for a key's values; P is 0 where there is only one value."""
    levels = list(dict.fromkeys(map(repr, values)))
    if is_numeric(values) and len(levels) > 2:
        rank_N = ranks([float(value) for value in values])
        rank_N = rank_N - rank_N.mean()
        x_NP = np.stack([rank_N, rank_N**2], axis=1)
    else:
        x_NP = np.array([[repr(value) == level for level in levels[1:]] for value in values], dtype=np.float64)
    return x_NP - x_NP.mean(0)
