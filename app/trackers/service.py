"""What a tracking service is to a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol


class Point(NamedTuple):
    """The scalars of one step of a stage. `time`: unix seconds."""

    stage: str
    step: int
    time: float
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class RunFacts:
    """What a service is told when a run is opened.

    known_id: the service's id of the run, from an earlier session; config: the recipe by dotted keys; path: absolute.
    """

    path: Path
    project: str
    name: str
    known_id: str | None
    config: Mapping[str, Any]


class TrackingService(Protocol):
    """One run on one service. Calls come one at a time and may raise whatever the service's library raises."""

    @property
    def run_id(self) -> str:
        """By which a later session goes on with the same run."""
        ...

    @property
    def address(self) -> str:
        """Where a person looks at the run."""
        ...

    def log(self, points: Sequence[Point]) -> None:
        """Record points; the same ones again where an earlier call has failed."""
        ...

    def close(self, *, failed: bool) -> None:
        """The session is over; wait, with a limit, until all is sent."""
        ...
