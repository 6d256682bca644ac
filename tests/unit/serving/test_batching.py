"""Batches form across callers while the model is busy, in order of arrival, and keep failures apart."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest

from serve.batching import Batcher


class Model:
    """Doubles its items, fails on 0, and records its batches; `gate` holds it while it is closed."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, items: Sequence[int]) -> list[int]:
        self.batches.append(list(items))
        assert self.gate.wait(10)
        if 0 in items:
            raise ZeroDivisionError("an item is 0")
        return [2 * item for item in items]


def batcher(model: Model, *, limit: int = 100, wait_seconds: float = 0.0) -> Batcher[int, int]:
    return Batcher(model, size=lambda item: item, limit=limit, wait_seconds=wait_seconds)


async def settle() -> None:
    await asyncio.sleep(0.05)


def test_callers_that_come_while_the_model_works_share_the_next_batch() -> None:
    async def scenario() -> None:
        model = Model()
        model.gate.clear()
        batches = batcher(model)
        first = asyncio.create_task(batches.submit(1))
        await settle()
        rest = []
        for item in (2, 3, 4):
            rest.append(asyncio.create_task(batches.submit(item)))
            await settle()
        model.gate.set()
        assert await asyncio.gather(first, *rest) == [2, 4, 6, 8]
        assert model.batches == [[1], [2, 3, 4]]

    asyncio.run(scenario())


def test_a_batch_keeps_to_its_limit_and_to_the_order_of_arrival() -> None:
    async def scenario() -> None:
        model = Model()
        answers = await asyncio.gather(*map(batcher(model, limit=10, wait_seconds=2.0).submit, (6, 3, 4, 50, 1)))
        assert answers == [12, 6, 8, 100, 2]
        assert model.batches[:3] == [[6, 3], [4], [50]]

    # No wait of 2 s where the limit is reached; the last item waits alone, and its wait is bounded.
    asyncio.run(asyncio.wait_for(scenario(), 3.8))


def test_one_caller_waits_no_longer_than_asked() -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        started = loop.time()
        assert await batcher(Model(), wait_seconds=0.2).submit(7) == 14
        assert 0.15 < loop.time() - started < 2

    asyncio.run(scenario())


def test_a_failure_reaches_its_own_batch_only() -> None:
    async def scenario() -> None:
        model = Model()
        batches = batcher(model)
        together = await asyncio.gather(batches.submit(0), batches.submit(5), return_exceptions=True)
        assert [type(answer) for answer in together] == [ZeroDivisionError, ZeroDivisionError]
        assert await batches.submit(5) == 10

    asyncio.run(scenario())


def test_callers_that_went_away_are_not_computed() -> None:
    async def scenario() -> None:
        model = Model()
        model.gate.clear()
        batches = batcher(model)
        first, gone = asyncio.create_task(batches.submit(1)), asyncio.create_task(batches.submit(2))
        await settle()
        late = asyncio.create_task(batches.submit(3))
        await settle()
        late.cancel()
        model.gate.set()
        assert await asyncio.gather(first, gone) == [2, 4]
        with pytest.raises(asyncio.CancelledError):
            await late
        await settle()
        assert model.batches == [[1, 2]]

    asyncio.run(scenario())
