"""A vLLM engine in a thread of its own, where all of its life happens: it is given requests and new weights between any two steps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import count
from typing import Any, TypeAlias, TypeVar

from app.errors import RolloutError, WeightPushError
from app.experience import IntArray
from app.workers.pushed_policy import Weights
from app.workers.step_loop import StepLoop

T = TypeVar("T")

Landed: TypeAlias = list[tuple[int, Any]]
"""Requests of one call that end with the same step: their places among its prompts, and vLLM's `RequestOutput`s, or the errors that took
them."""


@dataclass(frozen=True)
class _Call:
    """Requests that were given together; `land` is told which of them end with a step. What their prompts begin with is computed once."""

    number: int
    land: Callable[[Landed], None]


@dataclass(frozen=True)
class _Flight:
    """A request in the engine. place: among the prompts of its call."""

    inner_id: str
    prompt: IntArray
    params: Any
    place: int
    call: _Call

    def land(self, output: Any) -> None:
        """Alone, ahead of the others."""
        self.call.land([(self.place, output)])


class EngineThread:
    """Bring every other method to the engine with `call`."""

    def __init__(self, load: Callable[[], Any], *, redo: bool, sleeps: bool) -> None:
        """load: makes the `vllm.LLM`; redo: new weights start anew what is in flight, which otherwise goes on under them; sleeps: the
        engine gives its GPU's memory back while it has nothing to do."""
        self._redo, self._sleeps = redo, sleeps
        self._flights: dict[str, _Flight] = {}
        self._calls, self._names = count(), count()
        self._version = 0
        self._updating = False
        self._loop = StepLoop(self._step, self._busy, self._crash)
        self.call(lambda: self._begin(load())).result()

    def call(self, work: Callable[[], T]) -> Future[T]:
        """Do `work` in the engine's thread before its next step."""
        return self._loop.call(work)

    def any_in_flight(self) -> bool:
        """Whether there are requests that have not ended."""
        return bool(self._flights)

    def admit(self, prompts: Sequence[IntArray], params: Sequence[Any], land: Callable[[Landed], None]) -> None:
        """Requests that join the engine together, each with its vLLM sampling parameters; `land` is told of them as they end."""
        call = _Call(next(self._calls), land)
        for place, (prompt, one) in enumerate(zip(prompts, params, strict=True)):
            self._admit(prompt, one, place, call)

    def discard(self) -> None:
        """Drop what is in flight: nobody waits for it any more."""
        for flight in self._interrupt():
            flight.land(RolloutError("discarded: whoever asked for it wants it no more"))
        self._rest()

    def load(self, buckets: Callable[[], Iterable[Weights]], version: int) -> None:
        """New weights that this process holds. What `buckets` raises leaves the engine as it was."""
        pieces = buckets()
        self.begin_update()
        for tensors in pieces:
            self.transfer("update_weights", {"tensors": tensors})
        self.end_update(version)

    def begin_update(self) -> None:
        """Make ready for new weights. Until `end_update` no step is taken.

        Raises WeightPushError after an update that broke off: vLLM has kept the weights that came for a layer, and would count them as
        those of this one."""
        if self._updating:
            raise WeightPushError(
                "an earlier push of weights broke off in this rollout engine, and no other can be loaded on top of it: run the same "
                "command again, which starts another engine"
            )
        self._wake()
        self._updating = True
        self.transfer("start_weight_update")

    def end_update(self, version: int) -> None:
        """All weights are there; tokens from here on carry `version`."""
        self.transfer("finish_weight_update")
        self._hold(version)
        self._updating = False
        if self._redo:
            for flight in self._interrupt():
                self._admit(flight.prompt, flight.params, flight.place, flight.call)
        self._rest()

    def transfer(self, method: str, *args: Any) -> None:
        """One step of vLLM's weight-transfer interface on the engine's workers."""
        self._llm.collective_rpc(method, args=args)

    def _begin(self, llm: Any) -> None:
        self._llm, self._core = llm, llm.llm_engine
        self._hold(self._version)
        self._rest()  # the learner is the next to load

    def _hold(self, version: int) -> None:
        self._version = version
        self._core.set_weight_version(str(version))

    def _admit(self, prompt: IntArray, params: Any, place: int, call: _Call) -> None:
        """A cached prefix would outlive the weights that computed it, and what an engine has cached before it was lost is no part of a
        checkpoint: the salt keeps every call under every version to itself."""
        from vllm.inputs.engine import tokens_input

        self._wake()
        name = str(next(self._names))
        inner_id = self._core.add_request(name, tokens_input(prompt.tolist(), cache_salt=f"{call.number}.{self._version}"), params)
        self._flights[name] = _Flight(inner_id, prompt, params, place, call)

    def _interrupt(self) -> list[_Flight]:
        """Take everything in flight out of the engine."""
        interrupted = list(self._flights.values())
        self._flights.clear()
        self._core.abort_request([flight.inner_id for flight in interrupted], internal=True)
        return interrupted

    def _busy(self) -> bool:
        """Whether a step is to be taken. While new weights come in the layers hold parts of both policies, or nothing at all; after an
        update that broke off they do so for ever."""
        return bool(self._flights) and not self._updating

    def _step(self) -> None:
        landed: dict[_Call, Landed] = defaultdict(list)
        for output in self._core.step():
            if output.finished and output.request_id in self._flights:
                flight = self._flights.pop(output.request_id)
                landed[flight.call].append((flight.place, output))
        for call, ended in landed.items():
            call.land(ended)
        self._rest()

    def _rest(self) -> None:
        if self._sleeps and not self._flights:
            self._llm.sleep(level=1)

    def _wake(self) -> None:
        if self._sleeps and self._core.is_sleeping():
            self._llm.wake_up()

    def _crash(self, error: BaseException) -> None:
        for flight in self._flights.values():
            flight.land(error)
        self._flights.clear()
