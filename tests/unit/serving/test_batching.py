"""Batches form across callers while the model is busy, in order of arrival, and keep failures apart."""

from __future__ import annotations

import asyncio
import threading

import pytest

from app.errors import OverloadedError, ScoringTimeoutError
from serve.batching import Batch, Batcher


class Model:
    """Doubles its items, fails on 0, answers 13 with an error, and records its batches; `gate` holds it while it is closed."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, batch: Batch[int]) -> list[int | Exception]:
        self.batches.append(batch.items)
        assert self.gate.wait(10)
        if 0 in batch.items:
            raise ZeroDivisionError("an item is 0")
        return [ValueError("13") if item == 13 else 2 * item for item in batch.items]


class Items:
    """A batcher of numbers that are their own size."""

    def __init__(
        self, model: Model, *, max_tokens: int = 100, wait_seconds: float = 0.0, max_waiting: int = 1000, padded: bool = True
    ) -> None:
        self.batcher: Batcher[int, int] = Batcher(
            model, max_tokens=max_tokens, wait_seconds=wait_seconds, max_waiting=max_waiting, padded=lambda: padded
        )

    async def submit(self, item: int, *, timeout_seconds: float = 10.0, alone: bool = False, client: str = "") -> int:
        return await self.batcher.submit(item, [item], timeout_seconds=timeout_seconds, alone=alone, client=client)


batcher = Items


async def settle() -> None:
    await asyncio.sleep(0.01)


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


def test_a_batch_takes_the_oldest_and_the_most_similar_rows_up_to_its_limit_with_the_padding() -> None:
    async def scenario() -> None:
        model = Model()
        answers = await asyncio.gather(*map(batcher(model, max_tokens=120, wait_seconds=3600.0).submit, (40, 20, 500, 35, 30, 45)))
        assert answers == [80, 40, 1000, 70, 60, 90]
        assert model.batches == [[40, 35, 30], [20, 45], [500]]

    # No wait for more callers where the limit is reached.
    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_rows_of_very_different_length_do_not_pad_each_other() -> None:
    async def scenario() -> None:
        model = Model()
        batches = batcher(model, max_tokens=10_000, wait_seconds=0.05, max_waiting=10_000)
        await asyncio.gather(*map(batches.submit, (10, 300, 48, 200, 199)))
        assert model.batches == [[10, 48], [300, 200], [199]]

    asyncio.run(scenario())


def test_without_padding_a_batch_takes_what_fits_in_order_of_arrival() -> None:
    async def scenario() -> None:
        model = Model()
        batches = batcher(model, max_tokens=120, wait_seconds=0.05, padded=False)
        await asyncio.gather(*map(batches.submit, (10, 90, 40, 20, 500, 35)))
        assert model.batches == [[10, 90, 20], [40, 35], [500]]

    asyncio.run(scenario())


def test_one_caller_waits_no_longer_than_asked() -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        started = loop.time()
        assert await batcher(Model(), wait_seconds=0.1).submit(7) == 14
        assert loop.time() - started > 0.08

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


def test_what_a_caller_that_went_away_wanted_no_longer_counts() -> None:
    async def scenario() -> None:
        model = Model()
        model.gate.clear()
        batches = batcher(model, max_waiting=10)
        first, gone = asyncio.create_task(batches.submit(1)), asyncio.create_task(batches.submit(2))
        await settle()
        gone = asyncio.create_task(batches.submit(9))
        await settle()
        gone.cancel()
        await settle()
        later = asyncio.create_task(batches.submit(8))
        await settle()
        model.gate.set()
        assert await asyncio.gather(first, later) == [2, 16]

    asyncio.run(scenario())


def test_an_answer_that_is_an_error_belongs_to_its_caller_alone() -> None:
    async def scenario() -> None:
        model = Model()
        batches = batcher(model, wait_seconds=0.05)
        bad, good = await asyncio.gather(batches.submit(13), batches.submit(5), return_exceptions=True)
        assert isinstance(bad, ValueError) and good == 10
        assert model.batches == [[13, 5]]

    asyncio.run(scenario())


def test_items_that_are_to_be_alone_share_no_batch() -> None:
    async def scenario() -> None:
        model = Model()
        batches = batcher(model, wait_seconds=0.05)
        answers = [batches.submit(1), batches.submit(2, alone=True), batches.submit(3), batches.submit(4)]
        assert await asyncio.gather(*answers) == [2, 4, 6, 8]
        assert model.batches == [[1, 3, 4], [2]]

    asyncio.run(scenario())


def test_what_is_too_much_to_hold_is_refused_with_the_time_to_come_back() -> None:
    async def scenario() -> None:
        model = Model()
        batches = batcher(model, max_waiting=10)
        assert await batches.submit(1000) == 2000  # an idle model takes anything
        model.gate.clear()
        first = asyncio.create_task(batches.submit(4))
        await settle()
        waiting = asyncio.create_task(batches.submit(8))
        await settle()
        with pytest.raises(OverloadedError, match="8 tokens wait") as refused:
            await batches.submit(3)
        assert refused.value.retry_after >= 0.05
        model.gate.set()
        assert await asyncio.gather(first, waiting) == [8, 16]

    asyncio.run(scenario())


def test_an_item_whose_time_is_over_is_not_computed() -> None:
    async def scenario() -> None:
        model = Model()
        model.gate.clear()
        batches = batcher(model)
        first = asyncio.create_task(batches.submit(1))
        await settle()
        late = asyncio.create_task(batches.submit(2, timeout_seconds=0.01))
        await settle()
        model.gate.set()
        assert await first == 2
        with pytest.raises(ScoringTimeoutError, match="longer than it may"):
            await late
        assert model.batches == [[1]]

    asyncio.run(scenario())


def test_clients_take_turns_however_much_one_of_them_asks_for() -> None:
    async def scenario() -> None:
        model = Model()
        model.gate.clear()
        batches = batcher(model, max_tokens=40, max_waiting=10_000)
        flood = [asyncio.create_task(batches.submit(40, client="flood")) for _ in range(6)]
        await settle()
        others = [asyncio.create_task(batches.submit(item, client=client)) for item, client in ((38, "a"), (39, "b"), (37, "a"))]
        await settle()
        model.gate.set()
        await asyncio.gather(*flood, *others)
        assert model.batches == [[40], [38], [39], [40], [37], [40], [40], [40], [40]]
        assert set(batches.batcher._turns) <= {"flood"}  # nothing is kept of clients that have gone

    asyncio.run(scenario())
