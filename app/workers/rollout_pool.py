"""The rollout pool: vLLM engines that hold one policy, and others in the places of those that are lost."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ray

from app.config.rollout import RolloutConfig
from app.errors import EngineDiedError, RolloutError
from app.experience import FloatArray, IntArray, Prompt
from app.workers.engine_settings import engine_options
from app.workers.pending import collect
from app.workers.pushed_policy import PushedPolicy
from app.workers.rollout_engine import RolloutEngine
from app.workers.sampling import Sampling
from app.workers.watchdog import late, patiently

Note = Callable[[str], None]
"""Tells the user something that happened."""


class VllmRolloutPool:
    """`RolloutPool` over engine actors. An engine whose process ends is replaced by one that holds the current weights before it is
    given any prompt, and what it had not finished is sampled again, with the same seeds.

    One thread gives prompts and weights, another may follow what is sampled: either finds an engine dead, and one of them replaces it.
    """

    def __init__(
        self, start: Callable[[int], Any], config: RolloutConfig, *, deadline_seconds: float, note: Note, exact: bool = False
    ) -> None:
        """start: starts engine k, an actor of `RolloutEngine`. exact: an engine's batch that is interrupted is sampled again as a
        whole, because what stands beside a response in a batch changes the last bits of its log-probs."""
        self._start = start
        self.exact = exact
        self._restarts_left = config.max_restarts
        self._through_store = config.chosen_transfer == "object_store"
        self._deadline_seconds = deadline_seconds
        self._note = note
        self._current: tuple[str, tuple[Any, ...]] = ("pid", ())  # the call that gives a new engine the weights of now
        self._wanted = config.engines.count
        self._least = config.min_engines or self._wanted
        self._late: dict[Any, Any] = {}  # engines that wait for room, or load, by the call that answers once they have
        self._places: dict[Any, int] = {}  # what each engine that has no successor yet was started as: `engines` moves up where one is lost
        self._changing = threading.RLock()  # held while engines or the weights that they should have become others
        self._unasked = list(range(self._least, self._wanted))  # places of engines that nothing has been asked for yet
        self.engines = [self._begin(k) for k in range(self._least)]

    def ready(self) -> None:
        """Wait until every engine has loaded, or as many as `rollout.min_engines` asks for. The others are started with the first push of
        weights: before, they would take the room of the learner and the scoring service, which a run cannot begin without.

        Raises RolloutError when one cannot start, DeadlineError when it does not in time.
        """
        collect([engine.pid.remote() for engine in self.engines], **self._waiting("start"))

    def close(self) -> None:
        """End the processes of all engines."""
        for engine in (*self.engines, *self._late.values()):
            ray.kill(engine)

    def submit(self, prompts: Sequence[Prompt], *, seed: int) -> Sampling:
        """Start sampling; see `app.interfaces.RolloutPool`."""
        with self._changing:
            if self._late:
                self._take_in()
        return Sampling(self, prompts, seed=seed, deadline_seconds=self._deadline_seconds)

    def sample(self, prompts: Sequence[IntArray], settings: Sequence[Mapping[str, Any]]) -> list[IntArray]:
        """One response (token ids) per prompt, each under vLLM sampling settings of its own. Raises RolloutError."""
        count = len(self.engines)
        calls = [engine.sample.remote(prompts[k::count], settings[k::count]) for k, engine in enumerate(self.engines) if prompts[k::count]]
        answers = collect(calls, **self._waiting("sample"))
        return [answers[i % count][i // count] for i in range(len(prompts))]

    def logprobs(self, sequences: Sequence[IntArray]) -> list[FloatArray]:
        return self.each("logprobs", list(sequences))[0]

    def load(self, policy: PushedPolicy, version: int) -> None:
        """Give every engine new weights, through Ray's object store. They stay there for engines that start later."""
        self._load("load_policy", policy, version)
        with self._changing:
            for place in self._unasked:
                self._come_late(place)
            self._unasked.clear()

    def load_folder(self, path: str, version: int) -> None:
        """Give every engine the weights of a Hugging Face folder of the same architecture. Needs rollout.transfer = object_store."""
        self._load("load_folder", path, version)

    def refuse_replacements(self) -> None:
        """The weights come another way, which a new engine cannot go: one that is lost from now on cannot be replaced."""
        self._restarts_left = 0

    def discard(self) -> None:
        """Forget what is being sampled and where the weights came from: their learner is gone, and the next one brings its own. It has
        been asked for, where it shares no GPU with the engines.

        Engines that took weights from its GPU are ended, and others take their places: they may be in a group with it, or hold half of
        a policy, on which no other can be loaded."""
        with self._changing:
            self._current = ("pid", ())
            if self._through_store:
                if self._least < self._wanted:  # else each of them is needed as much as the learner
                    self._queue_again()
                self.each("discard")
                return
            self.close()
            self._late.clear()
            self._places.clear()
            self.engines = [self._begin(k) for k in range(self._least)]
            self.ready()

    def each(self, method: str, *args: Any) -> list[Any]:
        """Call `method` on every engine and wait for all answers."""
        engines = list(self.engines)
        calls = [getattr(engine, method).remote(*args) for engine in engines]
        return [self._answer(k, engines[k], call, method, args) for k, call in enumerate(calls)]

    def replace(self, k: int, lost: Any) -> Any:
        """The k-th engine now that `lost` has died: a new one with the current weights, started unless somebody did before.

        Where `rollout.min_engines` are left without it, the new one joins when it is up, and the answer is another engine. Else it is
        waited for, or for one that has waited for room longer. Where that one dies too before it has the weights, as on a node of which
        Ray does not know yet that it is gone, the next one is started.
        Raises RolloutError once `rollout.max_restarts` engines were lost.
        """
        with self._changing:
            return self._replaced(k, lost)

    def _next_up(self) -> Any:
        """The first call of a late engine that is answered. Raises DeadlineError."""
        phase, seconds, calls = "rollout engine: restart", self._deadline_seconds, list(self._late)
        up: list[Any] = []

        def wait(seconds: float) -> None:
            up[:], _ = ray.wait(calls, num_returns=1, timeout=seconds)
            if not up:
                raise TimeoutError

        try:
            patiently(wait, phase=phase, seconds=seconds)
        except TimeoutError:
            raise late(
                phase,
                f"none of {len(calls)} is up after {seconds:g} s, and one is needed: give them room, or raise run.deadline_seconds if they "
                "simply take that long",
            ) from None
        return up[0]

    def _begin(self, place: int) -> Any:
        engine = self._start(place)
        self._places[engine] = place
        return engine

    def _come_late(self, place: int) -> None:
        engine = self._begin(place)
        self._late[engine.pid.remote()] = engine

    def _load(self, method: str, *args: Any) -> None:
        with self._changing:
            self._current = (method, args)
        self.each(method, *args)

    def _replaced(self, k: int, lost: Any) -> Any:
        if all(engine is not lost for engine in self.engines):
            return self.engines[k % len(self.engines)]
        if lost in self._places:  # else another one has been on its way since an attempt that failed
            self._succeed(lost)
        at = next(at for at, each in enumerate(self.engines) if each is lost)
        if len(self.engines) > self._least:
            del self.engines[at]
            return self.engines[k % len(self.engines)]
        while True:  # whichever comes first: one that has waited for room may have got that of the lost one
            if (engine := self._taken_in(self._next_up())) is not None:
                self.engines[at] = engine
                return engine

    def _succeed(self, lost: Any) -> None:
        """Start another engine in the place of one that has died. It is late from the start."""
        place = self._places[lost]
        if not self._restarts_left:
            raise RolloutError(
                f"rollout engine {place} died and cannot be replaced (rollout.max_restarts is used up, or weights go over NCCL or IPC): "
                "look at its last lines under the run's logs/; the same command goes on from the last checkpoint"
            )
        del self._places[lost]
        self._restarts_left -= 1
        self._note(f"rollout engine {place} died; starting another one ({self._restarts_left} more may be lost)")
        ray.kill(lost)
        self._come_late(place)

    def _queue_again(self) -> None:
        """Late engines ask for room once more, behind whoever has asked by now: one may have got that of a process which is needed."""
        waiting = list(self._late.values())
        self._late.clear()
        for engine in waiting:
            ray.kill(engine)
            self._come_late(self._places.pop(engine))

    def _take_in(self) -> None:
        """Engines that have come up since: with the weights of now they are given prompts like all others."""
        up, _ = ray.wait(list(self._late), num_returns=len(self._late), timeout=0)
        for call in up:
            if (engine := self._taken_in(call)) is not None:
                self.engines.append(engine)
                self._note(f"a rollout engine joined: {len(self.engines)} of {self._wanted} are up")

    def _taken_in(self, call: Any) -> Any | None:
        """The late engine that answers `call`, with the weights of now; None where it has died, and another one is on its way."""
        engine = self._late.pop(call)
        try:
            collect([call], **self._waiting("pid"), died=EngineDiedError)
            self._bring_up_to_date(engine)
        except EngineDiedError:
            self._succeed(engine)
            return None
        except BaseException:
            self._late[engine.pid.remote()] = engine  # it can join once there are weights for it
            raise
        return engine

    def _bring_up_to_date(self, engine: Any) -> None:
        method, args = self._current
        collect([getattr(engine, method).remote(*args)], **self._waiting("restart"), died=EngineDiedError)

    def _answer(self, k: int, engine: Any, call: ray.ObjectRef[Any], method: str, args: tuple[Any, ...]) -> Any:
        while True:
            try:
                return collect([call], **self._waiting(method), died=EngineDiedError)[0]
            except EngineDiedError:
                engine = self.replace(k, engine)
                call = getattr(engine, method).remote(*args)

    def _waiting(self, method: str) -> dict[str, Any]:
        return {"phase": f"rollout engine: {method}", "deadline_seconds": self._deadline_seconds, "failure": RolloutError}


@contextmanager
def rollout_pool(
    model_path: str,
    config: RolloutConfig,
    *,
    precision: str,
    max_prompt_length: int,
    eos_ids: Sequence[int],
    seed: int,
    deadline_seconds: float,
    placement: Sequence[Any] = (),
    note: Note = lambda text: None,
    exact: bool = False,
) -> Iterator[VllmRolloutPool]:
    """Start the engines and end their processes at exit. They load while the caller goes on, and `ready` waits for them; engines on GPUs
    that others come to as well have loaded when the block begins. Raises as `VllmRolloutPool.ready`.

    model_path: HF folder or hub name that the engines start from (policy version 0); placement: a Ray scheduling strategy
    per engine (default: wherever there is room); exact: see `VllmRolloutPool`.
    """
    max_model_len = config.max_model_len or max_prompt_length + config.max_new_tokens
    engine_class = ray.remote(RolloutEngine)

    def start(k: int) -> Any:
        return engine_class.options(**engine_options(config, placement[k] if placement else "DEFAULT")).remote(
            model_path, config, precision=precision, max_model_len=max_model_len, eos_ids=list(eos_ids), seed=seed + k
        )

    pool = VllmRolloutPool(start, config, deadline_seconds=deadline_seconds, note=note, exact=exact)
    try:
        if config.loads_alone:
            pool.ready()
        yield pool
    finally:
        pool.close()
