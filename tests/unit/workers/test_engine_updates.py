"""New weights in an engine that samples meanwhile: over NCCL a push is several calls, and to its requests one moment all the same."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from app.config.rollout import RolloutConfig
from app.errors import WeightPushError
from app.workers import gpu_transfer
from app.workers.engine_thread import EngineThread, Landed
from app.workers.gpu_transfer import EngineActorsClient
from app.workers.rollout_engine import RolloutEngine
from tests.waiting import wait_until

LONG = 10**6


class Core:
    """vLLM's engine and its workers: writes down what happens. A request is its number of steps."""

    def __init__(self) -> None:
        self.llm_engine = self
        self.log: list[Any] = []
        self.updating = False
        self.left: dict[str, int] = {}
        self.salts: dict[str, str] = {}

    def collective_rpc(self, method: str, args: tuple[Any, ...]) -> None:
        self.log.append(method)
        if method in ("start_weight_update", "finish_weight_update"):
            if self.updating is (method == "start_weight_update"):
                raise RuntimeError(f"{method}: an update is under way: {self.updating}")
            self.updating = method == "start_weight_update"
        time.sleep(0.02)  # time for a step, if one were taken

    def set_weight_version(self, version: str) -> None:
        self.log.append(f"version {version}")

    def add_request(self, name: str, tokens: tuple[int, str], params: Any) -> str:
        self.log.append(f"add {name}")
        self.left[name], self.salts[name] = tokens
        return name

    def abort_request(self, names: list[str], *, internal: bool) -> None:
        self.log.append(f"abort {' '.join(names)}")
        for name in names:
            del self.left[name]

    def sleep(self, level: int) -> None:
        self.log.append(f"sleep {level}")

    def wake_up(self) -> None:
        self.log.append("wake")

    def is_sleeping(self) -> bool:
        return next((said for said in reversed(self.log) if said in ("sleep 1", "wake")), "wake") == "sleep 1"

    def step(self) -> list[Any]:
        self.log.append("step")
        time.sleep(0.001)
        self.left = {name: steps - 1 for name, steps in self.left.items()}
        ended = [name for name, steps in self.left.items() if not steps]
        for name in ended:
            del self.left[name]
        return [SimpleNamespace(finished=True, request_id=name) for name in ended]


class Actor:
    """An engine as Ray would run it: its calls share one event loop, in a thread of its own."""

    def __init__(self, in_flight: str) -> None:
        self.core, self.landed = Core(), list[str]()
        self.thread = EngineThread(lambda: self.core, redo=in_flight == "redo", sleeps=False)
        self.core.log.clear()
        self.engine: Any = object.__new__(RolloutEngine)
        self.engine._config, self.engine._engine = RolloutConfig.model_validate({"in_flight": in_flight}), self.thread
        self.events = asyncio.new_event_loop()
        threading.Thread(target=self.events.run_forever, daemon=True).start()

    def __getattr__(self, method: str) -> Any:
        call = getattr(self.engine, method)
        return SimpleNamespace(remote=lambda *args: asyncio.run_coroutine_threadsafe(call(*args), self.events))

    def admit(self, *steps: int) -> None:
        def land(ended: Landed) -> None:
            self.landed += [getattr(output, "request_id", str(output)) for _, output in ended]

        self.thread.call(lambda: self.thread.admit([np.array(count) for count in steps], [None] * len(steps), land)).result(10)

    def wait_for_step(self) -> None:
        """Until the engine has taken one from now on."""
        seen = len(self.core.log)
        wait_until(lambda: "step" in self.core.log[seen:], "a step", pause=0.001)


@pytest.fixture(autouse=True)
def no_vllm_and_no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = SimpleNamespace(tokens_input=lambda steps, cache_salt: (steps, cache_salt))
    for name, module in {"vllm": SimpleNamespace(), "vllm.inputs": SimpleNamespace(), "vllm.inputs.engine": inputs}.items():
        monkeypatch.setitem(sys.modules, name, module)  # type: ignore[arg-type]

    def get(calls: list[Future[Any]]) -> list[Any]:
        return [call.result(10) for call in calls]

    monkeypatch.setattr(gpu_transfer, "ray", SimpleNamespace(get=get))


@pytest.fixture
def actor(request: pytest.FixtureRequest) -> Iterator[Actor]:
    actor = Actor(request.param)
    yield actor
    actor.thread.call(actor.thread.discard).result(10)  # its thread takes no more steps
    actor.events.call_soon_threadsafe(actor.events.stop)


@pytest.mark.parametrize("actor", ["keep"], indirect=True)
def test_what_ends_with_one_step_is_handed_out_at_once_and_calls_do_not_mix(actor: Actor) -> None:
    def call(steps: list[int]) -> Any:
        async def run() -> list[list[int]]:
            outputs = actor.engine._outputs([np.array(count) for count in steps], [None] * len(steps))
            return [[place for place, _ in landed] async for landed in outputs]

        return asyncio.run_coroutine_threadsafe(run(), actor.events)

    first, second = call([3, 1, 3, 2]), call([3, 2, 3])
    assert [first.result(10), second.result(10)] == [[[1], [3], [0, 2]], [[1], [0, 2]]]


def push(actor: Actor, version: int) -> list[Any]:
    """What the engine did from the first call of a push to the next step, while it was given another request."""
    client = EngineActorsClient([actor], tensor_parallel=1)
    client.version = version
    client.start_weight_update()
    actor.admit(LONG)
    client.update_weights({"names": []})
    client.finish_weight_update()
    actor.wait_for_step()
    log = actor.core.log[actor.core.log.index("start_weight_update") :]
    return log[: log.index("step") + 1]


@pytest.mark.parametrize("actor", ["keep"], indirect=True)
def test_no_step_is_taken_while_weights_come_in_and_what_is_in_flight_goes_on_under_the_new_ones(actor: Actor) -> None:
    actor.admit(LONG)
    actor.wait_for_step()
    assert push(actor, 7) == ["start_weight_update", "add 1", "update_weights", "finish_weight_update", "version 7", "step"]
    assert len(actor.core.left) == 2 and actor.landed == []


@pytest.mark.parametrize("actor", ["redo"], indirect=True)
def test_what_is_in_flight_starts_anew_before_the_next_step(actor: Actor) -> None:
    actor.admit(LONG)
    actor.wait_for_step()
    begun = ["start_weight_update", "add 1", "update_weights", "finish_weight_update", "version 8"]
    assert push(actor, 8) == [*begun, "abort 0 1", "add 2", "add 3", "step"]


@pytest.mark.parametrize("actor", ["redo"], indirect=True)
def test_prefixes_are_shared_within_a_call_under_one_version_alone(actor: Actor) -> None:
    actor.admit(LONG, LONG)
    actor.admit(LONG)
    actor.load_policy.remote(SimpleNamespace(weights=lambda version: iter([{}])), 5).result(10)
    first, second, other, *anew = (actor.core.salts[str(k)] for k in range(6))
    assert first == second and anew[0] == anew[1]
    assert len({first, other, *anew}) == 4


@pytest.mark.parametrize("actor", ["wait"], indirect=True)
def test_a_push_that_waits_begins_when_nothing_is_in_flight(actor: Actor) -> None:
    actor.admit(30)
    log = push(actor, 9)
    assert log == ["start_weight_update", "add 1", "update_weights", "finish_weight_update", "version 9", "step"]
    assert actor.landed == ["0"] and actor.core.log.count("step") >= 30


@pytest.mark.parametrize("actor", ["keep"], indirect=True)
def test_after_a_push_that_broke_off_no_step_is_taken_and_no_other_push_is_mixed_with_it(actor: Actor) -> None:
    """vLLM would finish a layer as soon as it had as many weights as it needs, those of the first push among them."""
    actor.admit(LONG)
    EngineActorsClient([actor], tensor_parallel=1).start_weight_update()
    seen = len(actor.core.log)
    time.sleep(0.05)
    assert actor.core.log[seen:] == []
    with pytest.raises(WeightPushError, match=r"broke off.* run the same command again"):
        actor.start_update.remote().result(10)
    with pytest.raises(WeightPushError, match="broke off"):
        actor.load_policy.remote(SimpleNamespace(weights=lambda version: iter([{}])), 10).result(10)
    assert actor.core.log[seen:] == []


@pytest.mark.parametrize("actor", ["keep"], indirect=True)
def test_weights_from_the_object_store_come_in_between_two_steps_or_not_at_all(actor: Actor) -> None:
    def damaged(version: int) -> Iterator[Any]:
        raise WeightPushError(f"policy version {version}: bucket 1 of 1 is not what the learner has sent")

    actor.admit(LONG)
    with pytest.raises(WeightPushError, match="policy version 4"):
        actor.load_policy.remote(SimpleNamespace(weights=damaged), 4).result(10)
    actor.wait_for_step()
    assert set(actor.core.log) == {"add 0", "step"}, "it goes on as it was"
    actor.load_policy.remote(SimpleNamespace(weights=lambda version: iter([{}, {}])), 5).result(10)
    actor.wait_for_step()
    log = actor.core.log[actor.core.log.index("start_weight_update") :]
    assert log[:5] == ["start_weight_update", "update_weights", "update_weights", "finish_weight_update", "version 5"]
    assert set(log[5:]) == {"step"}


def test_on_a_shared_gpu_an_engine_sleeps_whenever_it_has_nothing_to_do() -> None:
    """Also when it has loaded: the learner that it shares the GPU with comes next."""
    core, landed = Core(), list[Landed]()
    thread = EngineThread(lambda: core, redo=False, sleeps=True)
    assert core.log == ["version 0", "sleep 1"]
    thread.call(lambda: thread.admit([np.array(1)], [None], landed.append)).result(10)
    wait_until(core.is_sleeping, "that it sleeps", pause=0.001)
    assert core.log[2:] == ["wake", "add 0", "step", "sleep 1"] and len(landed) == 1
    seen = len(core.log)
    thread.call(lambda: thread.load(lambda: iter([{}]), 3)).result(10)
    assert core.log[seen:] == ["wake", "start_weight_update", "update_weights", "finish_weight_update", "version 3", "sleep 1"]
