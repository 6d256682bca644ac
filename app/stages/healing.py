"""A learner that outlives its processes: where one is lost, the group is started anew and its work begins again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from types import TracebackType
from typing import Generic, Protocol, TypeVar

from app.errors import AlarmError, ConfigError, CorralError, DataError, Interrupted, LearnerError, ModelError, NonFiniteError

WOULD_COME_AGAIN = (AlarmError, ConfigError, DataError, Interrupted, LearnerError, ModelError, NonFiniteError)
"""Failures that say something about the run, not about its processes."""


class LearnerGroup(Protocol):
    """Processes that work together: without one of them the others are of no use."""

    def ready(self) -> None:
        """Wait until all of them can work; raises what kept one from it."""
        ...

    def lost(self) -> Sequence[int]:
        """Ranks whose process has ended or cannot be reached."""
        ...


Group = TypeVar("Group", bound=LearnerGroup)
T = TypeVar("T")


class HealedLearner(Generic[Group]):
    """A learner group for the length of a `with` block; `restarts` times another takes its place when a process of it is lost."""

    def __init__(
        self,
        start: Callable[[], AbstractContextManager[Group]],
        *,
        restarts: int,
        forget: Callable[[], None],
        note: Callable[[str], None],
        forget_first: bool = False,
    ) -> None:
        """start: a group that may still be loading. forget: rid other processes of what the lost group has left with them (weights,
        work under way), called while the next one loads; forget_first: before that, where they need its GPUs to themselves for it. note:
        hears of every loss."""
        self._start, self._forget, self._note = start, forget, note
        self._forget_first = forget_first
        self._left = restarts
        self._open = ExitStack()

    def __enter__(self) -> HealedLearner[Group]:
        self._group = self._open.enter_context(self._start())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open.close()

    def ready(self) -> None:
        """Wait until the group can work."""
        self.run(lambda group: None)

    def run(self, work: Callable[[Group], T]) -> T:
        """`work` on a group that is ready. Where a process of the group is lost meanwhile, `work` is called again on the next group,
        and has to know by itself where to go on. Raises what `work` raises while all processes live, and CorralError when
        `ppo.max_restarts` groups were lost."""
        while True:
            try:
                self._group.ready()
                return work(self._group)
            except WOULD_COME_AGAIN:
                raise
            except CorralError as error:
                lost = self._group.lost()
                if not lost:
                    raise
                self._replace(lost, error)

    def _replace(self, lost: Sequence[int], error: CorralError) -> None:
        ranks = f"learner rank {', '.join(map(str, lost))} died"
        if not self._left:
            raise CorralError(
                f"{ranks}, and ppo.max_restarts is used up: look at its last lines under the run's logs/; "
                "the same command goes on from the last checkpoint"
            ) from error
        self._left -= 1
        self._note(f"ppo: {ranks}; the learner starts anew from the last checkpoint ({self._left} more may be lost)")
        self._open.close()
        if self._forget_first:
            self._forget()
        self._group = self._open.enter_context(self._start())
        if not self._forget_first:
            self._forget()
