"""Work that is done already, for loops that are driven without workers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from app.experience import Rollout


class Done:
    def __init__(self, value: Any) -> None:
        self.value = value

    def result(self) -> Any:
        return self.value


class Sampled(Done):
    """Responses that end one by one, the last one first."""

    def finished(self) -> Iterator[list[int]]:
        yield from ([place] for place in reversed(range(len(self.value))))

    def __getitem__(self, place: int) -> Rollout:
        rollout: Rollout = self.value[place]
        return rollout

    def cancel(self) -> None:
        """Everything has ended."""
