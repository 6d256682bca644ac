"""Batching across callers, in front of a model that computes one batch at a time.

Ray's `@serve.batch` closes a batch when its wait is over, also while the model is busy, so under load callers that
arrive a few milliseconds apart never share a pass. Here a batch is closed when the model is free to take it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

from app.errors import OverloadedError, ScoringTimeoutError

Item = TypeVar("Item")
Answer = TypeVar("Answer")

RATE_MEMORY = 0.8
"""Weight of what was known about the speed against what the last batch said."""

SHORTEST_RETRY_SECONDS, LONGEST_RETRY_SECONDS = 0.05, 60.0


@dataclass(frozen=True)
class Batch(Generic[Item]):
    """What is computed together. waited: seconds that each item waited for its turn."""

    items: list[Item]
    waited: list[float]


@dataclass(frozen=True)
class _Waiting(Generic[Item, Answer]):
    item: Item
    size: int
    alone: bool
    future: asyncio.Future[Answer]
    arrived: float
    deadline: float


class Batcher(Generic[Item, Answer]):
    """Collects items of concurrent callers and computes them together, in one thread beside the event loop.

    compute: a batch -> answers in the order of its items; an answer that is an exception belongs to its caller alone. A batch takes
    items in order of arrival up to `limit` in total size (one item alone may exceed it), so that nobody waits for ever. The first
    item of a batch waits at most `wait_seconds` for more. More than `max_waiting` in total size is not held.
    """

    def __init__(
        self,
        compute: Callable[[Batch[Item]], Sequence[Answer | Exception]],
        *,
        limit: int,
        wait_seconds: float,
        max_waiting: int,
    ) -> None:
        self._compute = compute
        self._limit = limit
        self._wait_seconds = wait_seconds
        self._max_waiting = max_waiting
        self._waiting: deque[_Waiting[Item, Answer]] = deque()
        self._waiting_size = 0
        self._seconds_per_size = 0.0  # of the last batches, 0 until there was one
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batch")
        self._worker: asyncio.Task[None] | None = None
        self._full = asyncio.Event()

    async def submit(self, item: Item, size: int, *, timeout_seconds: float, alone: bool = False) -> Answer:
        """The answer to one item; `alone` keeps it out of batches with others.

        Raises OverloadedError when too much waits already, ScoringTimeoutError when its turn does not come within `timeout_seconds`,
        and what `compute` raised for its batch or answered to it.
        """
        if self._waiting and self._waiting_size + size > self._max_waiting:
            retry_after = min(max(self._waiting_size * self._seconds_per_size, SHORTEST_RETRY_SECONDS), LONGEST_RETRY_SECONDS)
            raise OverloadedError(f"{self._waiting_size} tokens wait already: ask again in {retry_after:.2g} s", retry_after)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer] = loop.create_future()
        self._waiting.append(_Waiting(item, size, alone, future, loop.time(), loop.time() + timeout_seconds))
        self._waiting_size += size
        if self._waiting_size >= self._limit or alone:
            self._full.set()
        if self._worker is None or self._worker.done():
            self._worker = loop.create_task(self._work())
        return await future

    async def _work(self) -> None:
        """Batch after batch until nobody waits."""
        loop = asyncio.get_running_loop()
        while self._waiting:
            await self._wait_for_more(self._waiting[0].arrived + self._wait_seconds - loop.time())
            taken = self._take(loop.time())
            if not taken:
                continue
            began = loop.time()
            batch = Batch([waiting.item for waiting in taken], [began - waiting.arrived for waiting in taken])
            computed = loop.run_in_executor(self._thread, self._compute, batch)
            await asyncio.wait([computed])  # does not raise: a failure belongs to the callers of this batch, not to this task
            self._learn_speed((loop.time() - began) / sum(waiting.size for waiting in taken))
            error = computed.exception()
            answers = [error] * len(taken) if error else computed.result()
            for waiting, answer in zip(taken, answers, strict=True):
                if waiting.future.done():  # cancelled meanwhile
                    continue
                if isinstance(answer, BaseException):
                    waiting.future.set_exception(answer)
                else:
                    waiting.future.set_result(answer)

    def _learn_speed(self, seconds_per_size: float) -> None:
        known = self._seconds_per_size or seconds_per_size
        self._seconds_per_size = RATE_MEMORY * known + (1 - RATE_MEMORY) * seconds_per_size

    async def _wait_for_more(self, seconds: float) -> None:
        self._full.clear()
        if seconds <= 0 or self._waiting_size >= self._limit or self._waiting[0].alone:
            return
        try:
            await asyncio.wait_for(self._full.wait(), seconds)
        except TimeoutError:
            return

    def _take(self, now: float) -> list[_Waiting[Item, Answer]]:
        """The next batch, without callers that have gone away or whose time is over."""
        batch: list[_Waiting[Item, Answer]] = []
        total = 0
        while self._waiting:
            first = self._waiting[0]
            if batch and (first.alone or batch[0].alone or total + first.size > self._limit):
                break
            self._waiting.popleft()
            self._waiting_size -= first.size
            if first.future.cancelled():
                continue
            if now > first.deadline:
                first.future.set_exception(ScoringTimeoutError(f"waited {now - first.arrived:.3g} s for a free model, longer than it may"))
                continue
            batch.append(first)
            total += first.size
        return batch
