"""Where a value lies on an axis of a figure, and the marks beside it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from app.search.results import is_numeric

LOG_FROM = 20.0
"""Positive numbers whose largest is this many times the smallest are laid out by their logarithm."""
TICKS = 5
LOG_DECADES = 3
"""Up to so many, marks stand at 1, 2 and 5 of each."""
NEAREST = 0.08
"""Whole numbers have marks of their own where these are at least so far apart."""


@dataclass(frozen=True)
class Axis:
    """From `low` at 0 to `high` at 1. values: the categories of an axis that is none of numbers, evenly spaced; marks: where marks
    stand on one of numbers, instead of at round values."""

    low: float
    high: float
    log: bool = False
    values: tuple[Any, ...] = ()
    marks: tuple[float, ...] = ()

    @classmethod
    def of(cls, found: Iterable[Any], *, log: bool | None = None) -> Axis:
        """An axis for the values of one key or metric, None and NaN left out; log None: where they span enough."""
        values = [value for value in found if value is not None and value == value]
        if not is_numeric(values):
            levels = {repr(value): value for value in values}
            return cls(0, max(1, len(levels) - 1), values=tuple(levels[name] for name in sorted(levels)))
        low, high = (min(values), max(values)) if values else (0.0, 1.0)
        if low == high:
            margin = abs(low) / 2 or 0.5
            return cls(low - margin, high + margin, marks=(low,))
        wide = low > 0 and high >= LOG_FROM * low
        axis = cls(low, high, wide if log is None else log and low > 0)
        whole = sorted(set(values)) if all(isinstance(value, int) for value in values) else []
        apart = all((axis.place(b) or 0.0) - (axis.place(a) or 0.0) >= NEAREST for a, b in pairwise(whole))
        return replace(axis, marks=tuple(whole) if apart else ())

    def place(self, value: Any) -> float | None:
        """0 to 1; None for what has no place: None and NaN."""
        if value is None or value != value:
            return None
        if self.values:
            if len(self.values) == 1:
                return 0.5
            return [repr(one) for one in self.values].index(repr(value)) / (len(self.values) - 1)
        low, high, at = (math.log(x) if self.log else x for x in (self.low, self.high, value))
        return min(1.0, max(0.0, (at - low) / (high - low)))

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Places and texts of the marks."""
        if self.values:
            return [(self.place(value) or 0.0, str(value)) for value in self.values]
        return [(place, f"{mark:.3g}") for mark in self.marks or self._round_marks() if (place := self.place(mark)) is not None]

    def _round_marks(self) -> Sequence[float]:
        from matplotlib.ticker import MaxNLocator

        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            steps = "125" if last - first <= LOG_DECADES else "1"
            every = 1 if steps != "1" else math.ceil((last - first) / TICKS)
            marks = [float(f"{step}e{decade}") for decade in range(first, last + 1, every) for step in steps]
        else:
            marks = [float(mark) for mark in MaxNLocator(TICKS).tick_values(self.low, self.high)]
        return [mark for mark in marks if self.low <= mark <= self.high]
