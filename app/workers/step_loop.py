"""One thread for an engine that computes in steps: it steps while requests are in flight, and between two steps does what it is asked."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


class StepLoop:
    """The whole life of an engine happens in this thread: it is built, asked and stepped here, so that nothing needs a lock.

    step: one step of the engine, which hands out what finished; busy: whether anything is in flight. Both run in the thread only.
    When a step raises, `broken` gets the error, the engine takes no more steps, and every later `call` raises the same.
    """

    def __init__(self, step: Callable[[], None], busy: Callable[[], bool], broken: Callable[[BaseException], None]) -> None:
        self._step, self._busy, self._broken = step, busy, broken
        self._asked: SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = SimpleQueue()
        self._error: BaseException | None = None
        threading.Thread(target=self._run, name="engine", daemon=True).start()

    def call(self, work: Callable[[], T]) -> Future[T]:
        """Do `work` in the thread before the next step; calls are done in the order they were made."""
        future: Future[T] = Future()
        self._asked.put((work, future))
        return future

    def _run(self) -> None:
        while True:
            while self._error is not None or not self._busy() or not self._asked.empty():
                self._do(*self._asked.get())
            try:
                self._step()
            except BaseException as error:  # noqa: BLE001 - told to everyone who waits, and to everyone who asks from now on
                self._error = error
                self._broken(error)

    def _do(self, work: Callable[[], Any], future: Future[Any]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        if self._error is not None:
            future.set_exception(self._error)
            return
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - belongs to the caller
            future.set_exception(error)
