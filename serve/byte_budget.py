"""How much of requests the doors hold at a time, over both of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from app.errors import OverloadedError

LONGEST_REQUESTS = 16
"""Requests of the greatest length that are held at a time; of short ones as many more."""


class ByteBudget:
    """Bytes of the requests that are being read or answered."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0

    @contextmanager
    def holding(self) -> Iterator[Callable[[int], None]]:
        """Of one request: call what it yields with the bytes that arrive; they count until the block ends. Raises OverloadedError
        when there is no room for them."""
        taken = 0

        def take(size: int) -> None:
            nonlocal taken
            if self._held + size > self._limit:
                raise OverloadedError("the service holds as many bytes of requests as it may; ask again", retry_after=1.0)
            self._held += size
            taken += size

        try:
            yield take
        finally:
            self._held -= taken
