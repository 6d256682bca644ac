"""What a search leaves: its files, and the words for how its trials end. Stages write it, pages and tables read it."""

from __future__ import annotations

import math
from typing import Any, Literal

HISTORY = "history.parquet"
CURVES = ("objective", "score_mean", "kl", "entropy", "response_length")
"""Columns of the history beside `trial` and `step`."""

Status = Literal["finished", "stopped early", "over KL budget", "diverged", "collapsed", "non-finite", "refused", "failed"]
"""How a trial ended."""
FINISHED: Status = "finished"
STOPPED_EARLY: Status = "stopped early"
OVER_BUDGET: Status = "over KL budget"
REFUSED: Status = "refused"
"""The recipe does not take the configuration."""
FAILED: Status = "failed"
"""An error took the trial."""
HELD: tuple[Status, ...] = (FINISHED, STOPPED_EARLY)
"""Ends that a winner may have: the first of them that any trial came to."""
BROKEN: tuple[Status, ...] = (OVER_BUDGET, "diverged", "collapsed", "non-finite")
"""Ends that a configuration brought upon itself: whatever its last objective was, it is worse than any that held."""
UNTRIED: tuple[Status, ...] = (REFUSED, FAILED)
"""Ends that say nothing about what a configuration is worth."""
MEASURED: tuple[Status, ...] = (*HELD, OVER_BUDGET)
"""Ends after which score and KL are those of a policy that still answers."""


def finite(value: Any) -> float | None:
    """None for None, NaN and infinities."""
    return None if value is None or not math.isfinite(value) else float(value)
