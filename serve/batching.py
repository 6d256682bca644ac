"""Batching across callers, in front of a model that computes one batch at a time.

Ray's `@serve.batch` closes a batch when its wait is over, also while the model is busy, so under load callers that
arrive a few milliseconds apart never share a pass. Here a batch is closed when the model is free to take it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

from app.errors import OverloadedError, ScoringTimeoutError

Item = TypeVar("Item")
Answer = TypeVar("Answer")

RATE_MEMORY = 0.8
"""Weight of what was known about the speed against what the last batch said."""

SHORTEST_RETRY_SECONDS, LONGEST_RETRY_SECONDS = 0.05, 60.0

LENGTH_RATIO, SHORT_ROW = 1.5, 32
"""Padded rows share a batch where the longer is at most this many times as long as the shorter; rows of up to `SHORT_ROW` tokens cost
so little that all of them do."""


@dataclass(frozen=True)
class Batch(Generic[Item]):
    """What is computed together. waited: seconds that each item waited for its turn."""

    items: list[Item]
    waited: list[float]


@dataclass(frozen=True, eq=False)
class _Waiting(Generic[Item, Answer]):
    item: Item
    rows: int
    longest: int
    tokens: int
    alone: bool
    future: asyncio.Future[Answer]
    arrived: float
    deadline: float


class Batcher(Generic[Item, Answer]):
    """Collects items of concurrent callers and computes them together, in one thread beside the event loop.

    An item is one or more rows of tokens. A batch is the item that has waited longest, so that nobody waits for ever, and others up
    to `max_tokens` (one item alone may exceed it): in order of arrival where rows are computed without padding; where `padded` says
    that all are padded to the longest, those of similar length, the most similar first, and the padding counts.

    compute: a batch -> answers in the order of its items; an answer that is an exception belongs to its caller alone. An idle model
    waits at most `wait_seconds` for more callers. More than `max_waiting` tokens are not held.
    """

    def __init__(
        self,
        compute: Callable[[Batch[Item]], Sequence[Answer | Exception]],
        *,
        max_tokens: int,
        wait_seconds: float,
        max_waiting: int,
        padded: Callable[[], bool],
    ) -> None:
        self._compute = compute
        self._padded = padded
        self._max_tokens = max_tokens
        self._wait_seconds = wait_seconds
        self._max_waiting = max_waiting
        self._waiting: dict[_Waiting[Item, Answer], None] = {}  # in order of arrival
        self._waiting_tokens = 0
        self._seconds_per_token = 0.0  # of the last batches, 0 until there was one
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batch")
        self._worker: asyncio.Task[None] | None = None
        self._full = asyncio.Event()

    async def submit(self, item: Item, lengths: Sequence[int], *, timeout_seconds: float, alone: bool = False) -> Answer:
        """The answer to one item with rows of these lengths; `alone` keeps it out of batches with others.

        Raises OverloadedError when too much waits already, ScoringTimeoutError when its turn does not come within `timeout_seconds`,
        and what `compute` raised for its batch or answered to it.
        """
        tokens = sum(lengths)
        if self._waiting and self._waiting_tokens + tokens > self._max_waiting:
            retry_after = min(max(self._waiting_tokens * self._seconds_per_token, SHORTEST_RETRY_SECONDS), LONGEST_RETRY_SECONDS)
            raise OverloadedError(f"{self._waiting_tokens} tokens wait already: ask again in {retry_after:.2g} s", retry_after)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer] = loop.create_future()
        waiting = _Waiting(item, len(lengths), max(lengths), tokens, alone, future, loop.time(), loop.time() + timeout_seconds)
        self._waiting[waiting] = None
        self._waiting_tokens += tokens
        if self._waiting_tokens >= self._max_tokens or alone:
            self._full.set()
        if self._worker is None or self._worker.done():
            self._worker = loop.create_task(self._work())
        try:
            return await future
        finally:
            self._forget(waiting)  # still there where its caller has gone away

    async def _work(self) -> None:
        """Batch after batch until nobody waits."""
        loop = asyncio.get_running_loop()
        while self._waiting:
            await self._wait_for_more(next(iter(self._waiting)).arrived + self._wait_seconds - loop.time())
            taken = self._take(loop.time())
            if not taken:
                continue
            began = loop.time()
            batch = Batch([waiting.item for waiting in taken], [began - waiting.arrived for waiting in taken])
            computed = loop.run_in_executor(self._thread, self._compute, batch)
            await asyncio.wait([computed])  # does not raise: a failure belongs to the callers of this batch, not to this task
            self._learn_speed((loop.time() - began) / sum(waiting.tokens for waiting in taken))
            error = computed.exception()
            answers = [error] * len(taken) if error else computed.result()
            for waiting, answer in zip(taken, answers, strict=True):
                if waiting.future.done():  # cancelled meanwhile
                    continue
                if isinstance(answer, BaseException):
                    waiting.future.set_exception(answer)
                else:
                    waiting.future.set_result(answer)

    def _learn_speed(self, seconds_per_token: float) -> None:
        known = self._seconds_per_token or seconds_per_token
        self._seconds_per_token = RATE_MEMORY * known + (1 - RATE_MEMORY) * seconds_per_token

    async def _wait_for_more(self, seconds: float) -> None:
        self._full = asyncio.Event()
        if seconds <= 0 or self._waiting_tokens >= self._max_tokens or any(waiting.alone for waiting in self._waiting):
            return
        try:
            await asyncio.wait_for(self._full.wait(), seconds)
        except TimeoutError:
            return

    def _take(self, now: float) -> list[_Waiting[Item, Answer]]:
        """The next batch, without items whose time is over."""
        for late in [waiting for waiting in self._waiting if now > waiting.deadline]:
            self._forget(late)
            if not late.future.done():
                late.future.set_exception(ScoringTimeoutError(f"waited {now - late.arrived:.3g} s for a free model, longer than it may"))
        if not self._waiting:
            return []
        oldest, *others = self._waiting
        batch = [oldest]
        if not oldest.alone:
            together = [other for other in others if not other.alone]
            batch += self._similar(oldest, together) if self._padded() else self._next(oldest, together)
        for waiting in batch:
            self._forget(waiting)
        return batch

    def _next(self, oldest: _Waiting[Item, Answer], others: list[_Waiting[Item, Answer]]) -> Iterator[_Waiting[Item, Answer]]:
        """Of `others` what fits beside the oldest."""
        tokens = oldest.tokens
        for other in others:
            if tokens + other.tokens <= self._max_tokens:
                tokens += other.tokens
                yield other

    def _similar(self, oldest: _Waiting[Item, Answer], others: list[_Waiting[Item, Answer]]) -> Iterator[_Waiting[Item, Answer]]:
        """Of `others` what fits beside the oldest with the padding, and wastes little on it."""
        rows, longest = oldest.rows, oldest.longest
        for other in sorted(others, key=lambda other: abs(other.longest - oldest.longest)):  # equal ones stay in order of arrival
            padded = (rows + other.rows) * max(longest, other.longest)
            if padded <= self._max_tokens and similar(oldest.longest, other.longest):
                rows, longest = rows + other.rows, max(longest, other.longest)
                yield other

    def _forget(self, waiting: _Waiting[Item, Answer]) -> None:
        if waiting in self._waiting:
            del self._waiting[waiting]
            self._waiting_tokens -= waiting.tokens


def similar(length: int, other: int) -> bool:
    """Whether rows of these lengths may be padded to one."""
    return max(length, other) <= LENGTH_RATIO * max(min(length, other), SHORT_ROW)
