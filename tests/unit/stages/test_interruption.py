"""A request to stop is served by the block it meets, or right after it."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest

from app.errors import Interrupted
from app.stages.interruption import raise_unserved, stop_requests


def interrupted_twice() -> None:
    with stop_requests() as requested:
        assert not requested()
        signal.raise_signal(signal.SIGTERM)
        assert requested()
        signal.raise_signal(signal.SIGINT)


def stopped_in_time() -> None:
    with stop_requests() as requested:
        signal.raise_signal(signal.SIGINT)
        if requested():
            raise Interrupted("stopped after step 3")


@pytest.mark.parametrize(("block", "error"), [(interrupted_twice, KeyboardInterrupt), (stopped_in_time, Interrupted)])
def test_the_first_signal_is_a_request_and_the_second_interrupts(block: Callable[[], None], error: type[BaseException]) -> None:
    with pytest.raises(error):
        block()
    raise_unserved("nothing")


def test_a_request_during_the_last_step_stops_after_the_commit() -> None:
    with stop_requests():
        signal.raise_signal(signal.SIGINT)
    with pytest.raises(Interrupted, match="stopped when sft was finished; the same command"):
        raise_unserved("stopped when sft was finished")
    raise_unserved("nothing")
