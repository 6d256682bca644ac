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

Item = TypeVar("Item")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class _Waiting(Generic[Item, Answer]):
    item: Item
    future: asyncio.Future[Answer]
    arrived: float


class Batcher(Generic[Item, Answer]):
    """Collects items of concurrent callers and computes them together, in one thread beside the event loop.

    compute: items -> answers in the same order; size: of one item. A batch takes items in order of arrival up to `limit`
    in total size (one item alone may exceed it). The first item of a batch waits at most `wait_seconds` for more.
    """

    def __init__(
        self,
        compute: Callable[[Sequence[Item]], Sequence[Answer]],
        *,
        size: Callable[[Item], int],
        limit: int,
        wait_seconds: float,
    ) -> None:
        self._compute = compute
        self._size = size
        self._limit = limit
        self._wait_seconds = wait_seconds
        self._waiting: deque[_Waiting[Item, Answer]] = deque()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batch")
        self._worker: asyncio.Task[None] | None = None
        self._full = asyncio.Event()

    async def submit(self, item: Item) -> Answer:
        """The answer to one item. Raises what `compute` raised for its batch."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer] = loop.create_future()
        self._waiting.append(_Waiting(item, future, loop.time()))
        if self._waiting_size() >= self._limit:
            self._full.set()
        if self._worker is None or self._worker.done():
            self._worker = loop.create_task(self._work())
        return await future

    def _waiting_size(self) -> int:
        return sum(self._size(waiting.item) for waiting in self._waiting)

    async def _work(self) -> None:
        """Batch after batch until nobody waits."""
        loop = asyncio.get_running_loop()
        while self._waiting:
            await self._wait_for_more(self._waiting[0].arrived + self._wait_seconds - loop.time())
            batch = self._take()
            if not batch:
                continue
            computed = loop.run_in_executor(self._thread, self._compute, [waiting.item for waiting in batch])
            await asyncio.wait([computed])  # does not raise: a failure belongs to the callers of this batch, not to this task
            error = computed.exception()
            for index, waiting in enumerate(batch):
                if waiting.future.done():  # cancelled meanwhile
                    continue
                if error:
                    waiting.future.set_exception(error)
                else:
                    waiting.future.set_result(computed.result()[index])

    async def _wait_for_more(self, seconds: float) -> None:
        self._full.clear()
        if seconds <= 0 or self._waiting_size() >= self._limit:
            return
        try:
            await asyncio.wait_for(self._full.wait(), seconds)
        except TimeoutError:
            return

    def _take(self) -> list[_Waiting[Item, Answer]]:
        """The next batch, without callers that have gone away."""
        batch: list[_Waiting[Item, Answer]] = []
        total = 0
        while self._waiting:
            size = self._size(self._waiting[0].item)
            if batch and total + size > self._limit:
                break
            waiting = self._waiting.popleft()
            if not waiting.future.cancelled():
                batch.append(waiting)
                total += size
        return batch
