"""How data sets are mixed: how many rows of each an epoch takes, and which. A function of seed and epoch alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any

import numpy as np

from app.config.data import SetConfig


@dataclass(frozen=True)
class Segment:
    """Rows `start` to `start + rows - 1` belong to one data set, and an epoch takes `taken` of them."""

    start: int
    rows: int
    taken: int


@dataclass(frozen=True)
class Mixture:
    """The rows of all sets, one set after another."""

    segments: tuple[Segment, ...]

    @classmethod
    def of(cls, datasets: Iterable[str], sources: Mapping[str, SetConfig]) -> Mixture:
        """datasets: the data set of each row, equal ones next to each other. Sets that `sources` does not name are taken whole.

        >>> Mixture.of(["a", "a", "a", "b"], {"a": SetConfig(fraction=0.7)}).rows_per_epoch
        3
        """
        segments: list[Segment] = []
        start = 0
        for name, rows in groupby(datasets):
            count = sum(1 for _ in rows)
            segments.append(Segment(start, count, sources.get(name, SetConfig()).rows_per_epoch(count)))
            start += count
        return cls(tuple(segments))

    @property
    def rows_per_epoch(self) -> int:
        """Rows of one epoch, over all sets."""
        return sum(segment.taken for segment in self.segments)

    def rows(self, first: int, count: int, *, seed: int) -> list[int]:
        """`count` rows from position `first` of an endless stream of epochs.

        Each epoch draws its rows of each set anew, without replacement, and mixes the sets; where all rows are taken an epoch is a
        permutation. Positions run on across the seam between epochs.
        """
        found: list[int] = []
        while len(found) < count:
            epoch, offset = divmod(first + len(found), self.rows_per_epoch)
            found += _epoch(self, seed, epoch)[offset : offset + count - len(found)].tolist()
        return found


@lru_cache(maxsize=4)  # two epochs meet in a batch at most times; large sets take milliseconds to shuffle
def _epoch(mixture: Mixture, seed: int, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    rng = np.random.default_rng([seed, epoch])
    drawn = [segment.start + rng.permutation(segment.rows)[: segment.taken] for segment in mixture.segments]
    return drawn[0] if len(drawn) == 1 else rng.permutation(np.concatenate(drawn))
