"""How a batch is dealt over engines and put together again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from app.config.rollout import RolloutConfig
from app.config.shared import WorkersConfig
from app.errors import DeadlineError, EngineDiedError, RolloutError
from app.experience import Prompt
from app.workers import rollout_pool, sampling
from app.workers.pushed_policy import PushedPolicy, Shipment
from app.workers.rollout_engine import Sampled
from app.workers.rollout_pool import VllmRolloutPool
from app.workers.sampling import request_seed
from tests.counted_calls import calls_of


@pytest.mark.parametrize("prompts", [1, 2, 7])
@pytest.mark.parametrize("engines", [1, 3])
def test_samples_come_back_in_order(prompts: int, engines: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def sample(ids: Sequence[Any], settings: Sequence[Any]) -> list[Any]:
        asked.append(len(ids))
        return [np.append(row, one["max_tokens"]) for row, one in zip(ids, settings, strict=True)]

    for module in (rollout_pool, sampling):
        monkeypatch.setattr(module, "collect", lambda calls, **_: calls)
    engine = Engine(0)
    engine.sample = SimpleNamespace(remote=sample)
    config = RolloutConfig(engines=WorkersConfig(count=engines))
    pool = VllmRolloutPool(lambda k: engine, config, deadline_seconds=1, note=print)
    answers = pool.sample([np.array([k], np.int32) for k in range(prompts)], [{"max_tokens": 10 + k} for k in range(prompts)])
    assert [answer.tolist() for answer in answers] == [[k, 10 + k] for k in range(prompts)]
    assert sum(asked) == prompts
    assert len(asked) == min(engines, prompts), "no engine is called for nothing"


class Engine:
    """Answers each prompt with its own first token, as often as its version says, until it dies after `life` responses."""

    def __init__(self, version: int, life: int = 1000) -> None:
        self.version, self.life = version, life
        self.seeds: list[int] = []
        self.generate = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=self._generate))
        self.pid = self.load_policy = self.discard = SimpleNamespace(remote=lambda *arguments: (*arguments, object()))
        self.sample: Any = None

    def _generate(self, prompts: Sequence[Any], seeds: Sequence[int]) -> Iterator[Any]:
        self.seeds += seeds
        for index, prompt in reversed(list(enumerate(prompts))):
            self.life -= 1
            if self.life < 0:
                yield EngineDiedError("gone")
            ids = np.repeat(prompt[:1], self.version)
            yield [(index, Sampled(ids, np.full(len(ids), -1.0, np.float32), np.full(len(ids), self.version, np.int32), "stop"))]


def pool_of(
    engines: Sequence[Engine], monkeypatch: pytest.MonkeyPatch, restarts: int = 3, *, exact: bool = False, gpus: float = 0, **config: Any
) -> VllmRolloutPool:
    """A pool of the first engines in the list; the others wait to replace those that die."""

    def collect(references: Sequence[Any], **_: Any) -> Sequence[Any]:
        for reference in references:
            if isinstance(reference, Exception):
                raise reference
        return references

    calls = {"wait": lambda streams, num_returns, timeout: (streams[:num_returns], []), "kill": lambda engine: None}
    for module in (rollout_pool, sampling):
        monkeypatch.setattr(module, "collect", collect)
        monkeypatch.setattr(module, "ray", SimpleNamespace(**calls))
    waiting = iter(engines)
    settings = RolloutConfig(engines=WorkersConfig(count=2, gpus=gpus), max_restarts=restarts, **config)
    return VllmRolloutPool(lambda k: next(waiting), settings, deadline_seconds=1, note=lambda text: None, exact=exact)


WEIGHTS = PushedPolicy(Shipment(), Shipment(), None, first=True)
PROMPTS = [Prompt(str(k), "", np.array([10 + k], np.int32)) for k in range(7)]


def test_every_rollout_stands_at_its_prompt_with_the_versions_of_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = pool_of([Engine(3), Engine(4)], monkeypatch).submit(PROMPTS, seed=1)
    assert sorted(place for places in sampling.finished() for place in places) == list(range(7))
    rollouts = sampling.result()
    assert [rollout.policy_version for rollout in rollouts] == [3, 4, 3, 4, 3, 4, 3]
    assert [rollout.ids.tolist() for rollout in rollouts] == [[10 + k] * (3 + k % 2) for k in range(7)]
    assert sampling[2] is rollouts[2]


def test_what_a_batch_takes_grows_no_faster_than_its_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(count: int) -> int:
        pool, prompts = pool_of([Engine(3), Engine(4)], monkeypatch), [Prompt(str(k), "", PROMPTS[0].ids) for k in range(count)]
        return calls_of(lambda: pool.submit(prompts, seed=1).result())

    work(2)  # what is called only once
    assert work(512) < 1.5 * 8 * work(64)


def test_what_a_dead_engine_had_not_finished_is_sampled_again_with_its_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    mortal, heir = Engine(3, life=1), Engine(5)
    pool = pool_of([mortal, Engine(4), heir], monkeypatch)
    rollouts = pool.submit(PROMPTS, seed=1).result()
    assert [rollout.policy_version for rollout in rollouts] == [5, 4, 5, 4, 5, 4, 3]
    assert [rollout.ids[0] for rollout in rollouts] == [10 + k for k in range(7)]
    assert mortal.seeds == [request_seed(1, str(k), 0) for k in (0, 2, 4, 6)]
    assert heir.seeds == mortal.seeds[:3]
    assert pool.engines[0] is heir


def test_an_exact_run_samples_an_interrupted_batch_again_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    mortal, heir = Engine(3, life=1), Engine(5)
    rollouts = pool_of([mortal, Engine(4), heir], monkeypatch, exact=True).submit(PROMPTS, seed=1).result()
    assert [rollout.policy_version for rollout in rollouts] == [5, 4, 5, 4, 5, 4, 5]
    assert heir.seeds == mortal.seeds


class DiesWhenItIsDone(Engine):
    """Its process ends between its last response and the end of its answer."""

    def _generate(self, prompts: Sequence[Any], seeds: Sequence[int]) -> Iterator[Any]:
        yield from super()._generate(prompts, seeds)
        yield EngineDiedError("gone")


@pytest.mark.parametrize("exact", [False, True])
def test_of_an_engine_that_dies_when_it_is_done_nothing_is_sampled_again(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever follows the batch may have had it judged by then."""
    heir = Engine(5)
    sampling = pool_of([DiesWhenItIsDone(3), Engine(4), heir], monkeypatch, exact=exact).submit(PROMPTS, seed=1)
    assert sorted(place for places in sampling.finished() for place in places) == list(range(7))
    assert [rollout.policy_version for rollout in sampling.result()] == [3, 4, 3, 4, 3, 4, 3] and not heir.seeds


def test_engines_are_replaced_so_often_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = pool_of([Engine(3, life=1), Engine(4), Engine(5, life=1), Engine(6)], monkeypatch, restarts=1)
    with pytest.raises(RolloutError, match="max_restarts"):
        pool.submit(PROMPTS, seed=1).result()


class SlowEngine(Engine):
    """Not up before it is told to be."""

    def __init__(self, version: int, life: int = 1000, *, up: bool = False) -> None:
        super().__init__(version, life)
        self.up, self.loaded = up, list[Any]()
        self.pid = SimpleNamespace(remote=lambda: self)
        self.load_policy = SimpleNamespace(remote=lambda policy, version: self.loaded.append(version))


def growing_pool(
    engines: Sequence[Engine], monkeypatch: pytest.MonkeyPatch, notes: list[str], places: list[int] | None = None, *, push: bool = True
) -> VllmRolloutPool:
    """Two engines wanted, one needed. places: of those that were started; push: it has been given weights."""
    pool_of(engines, monkeypatch)

    def wait(calls: Sequence[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        up = [call for call in calls if getattr(call, "up", True)][:num_returns]
        return up, [call for call in calls if call not in up]

    def start(k: int) -> Engine:
        if places is not None:
            places.append(k)
        return next(waiting)

    monkeypatch.setattr(rollout_pool.ray, "wait", wait)
    waiting = iter(engines)
    config = RolloutConfig(engines=WorkersConfig(count=2), min_engines=1)
    pool = VllmRolloutPool(start, config, deadline_seconds=1, note=notes.append)
    pool.ready()
    if push:
        pool.load(WEIGHTS, 0)
    return pool


def test_engines_that_may_come_later_are_started_with_the_first_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, learner and scoring service look for room, without which there is no run."""
    places: list[int] = []
    pool = growing_pool([Engine(3), SlowEngine(4)], monkeypatch, [], places, push=False)
    pool.submit(PROMPTS, seed=1).result()
    assert places == [0]
    for version in (1, 2):
        pool.load(WEIGHTS, version)
        assert places == [0, 1]


def test_a_lost_engine_in_whose_place_none_comes_up_is_told_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = growing_pool([Engine(3, life=1), SlowEngine(4), SlowEngine(5)], monkeypatch, [])
    expected = "^rollout engine: restart: none of 2 is up after 1 s, and one is needed: give them room"
    with pytest.raises(DeadlineError, match=expected):
        pool.submit(PROMPTS, seed=1).result()


def test_an_engine_that_finds_room_later_joins_with_the_weights_of_then(monkeypatch: pytest.MonkeyPatch) -> None:
    first, late, notes = Engine(3), SlowEngine(4), list[str]()
    pool = growing_pool([first, late], monkeypatch, notes)
    assert {rollout.policy_version for rollout in pool.submit(PROMPTS, seed=1).result()} == {3}
    pool.load(WEIGHTS, 7)
    assert late.loaded == [] and notes == []
    late.up = True
    rollouts = pool.submit(PROMPTS, seed=1).result()
    assert late.loaded == [7] and notes == ["a rollout engine joined: 2 of 2 are up"]
    assert [rollout.policy_version for rollout in rollouts] == [3, 4, 3, 4, 3, 4, 3]


def test_a_lost_engine_is_not_waited_for_where_enough_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    mortal, first, heir, notes = SlowEngine(5, life=1, up=True), Engine(3), SlowEngine(4), list[str]()
    pool = growing_pool([first, mortal, heir], monkeypatch, notes)
    pool.submit([], seed=0)
    assert pool.engines == [first, mortal]
    rollouts = pool.submit(PROMPTS, seed=1).result()
    assert [rollout.policy_version for rollout in rollouts] == [3, 3, 3, 3, 3, 5, 3]
    assert pool.engines == [first] and len(notes) == 2 and "died" in notes[1]
    heir.up = True
    assert {rollout.policy_version for rollout in pool.submit(PROMPTS, seed=1).result()} == {3, 4}


def test_an_engine_is_started_in_the_place_of_the_one_that_was_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a trial each place is a bundle of its placement group, and holds one engine."""
    first, second, places = Engine(3, life=1), SlowEngine(5, up=True), list[int]()
    heir, next_heir = SlowEngine(4), SlowEngine(6, up=True)
    pool = growing_pool([first, second, heir, next_heir], monkeypatch, [], places)
    pool.submit([], seed=0)
    assert pool.engines == [first, second]
    pool.submit(PROMPTS, seed=1).result()
    assert pool.engines == [second] and places == [0, 1, 0], "the first one has died"
    second.life = 1
    pool.submit(PROMPTS, seed=2).result()
    assert pool.engines == [next_heir] and places == [0, 1, 0, 1]


def test_a_pool_whose_last_needed_engine_dies_waits_for_its_heir(monkeypatch: pytest.MonkeyPatch) -> None:
    heir = SlowEngine(6, up=True)
    pool = growing_pool([Engine(3, life=1), SlowEngine(4), heir], monkeypatch, [])
    assert {rollout.policy_version for rollout in pool.submit(PROMPTS, seed=1).result()} == {3, 6}
    assert pool.engines == [heir]


def test_or_for_one_that_has_waited_for_the_room_of_the_dead_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray gives it to whoever has asked first, and the heir may have to wait until the end of the run."""
    late, heir = SlowEngine(4), SlowEngine(6)
    pool = growing_pool([Engine(3, life=1), late, heir], monkeypatch, [])
    sampling = pool.submit(PROMPTS, seed=1)
    late.up = True
    assert {rollout.policy_version for rollout in sampling.result()} == {3, 4}
    assert pool.engines == [late]
    heir.up = True
    pool.submit([], seed=1)
    assert pool.engines == [late, heir]


def test_a_learner_that_is_gone_leaves_no_weights_for_engines_that_start_later(monkeypatch: pytest.MonkeyPatch) -> None:
    mortal, heir = Engine(3, life=0), Engine(0)
    heir.load_policy = SimpleNamespace(remote=lambda *arguments: RolloutError("the owner of the weights is dead"))
    pool = pool_of([mortal, Engine(4), heir], monkeypatch)
    pool.load(WEIGHTS, 3)
    pool.discard()
    assert pool.replace(0, mortal) is heir


def test_engines_that_wait_for_room_queue_behind_the_next_learner(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them may have got what the lost learner has left, and the run cannot go on without a learner."""
    first, late, again, places, killed = Engine(3), SlowEngine(4), SlowEngine(5, up=True), list[int](), list[Engine]()
    pool = growing_pool([first, late, again], monkeypatch, [], places)
    monkeypatch.setattr(rollout_pool.ray, "kill", killed.append)
    late.up = True
    pool.discard()
    assert (killed, places, pool.engines) == ([late], [0, 1, 1], [first])
    pool.submit([], seed=0)
    assert pool.engines == [first, again]


@pytest.mark.parametrize("way", [{"transfer": "nccl"}, {"transfer": "ipc", "colocate": True}])
def test_engines_that_took_weights_from_the_gpu_of_a_learner_that_is_gone_make_room_for_others(
    way: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may be in a group with it, or hold half of a policy, on which no other can be loaded."""
    engines = [Engine(k) for k in range(4)]
    pool = pool_of(engines, monkeypatch, gpus=1, **way)
    pool.discard()
    assert pool.engines == engines[2:]


def test_an_engine_that_dies_before_it_has_the_weights_is_replaced_in_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray may place it on a node of which it does not know yet that it is gone."""
    mortal, stillborn, heir = Engine(3, life=1), Engine(0), Engine(5)
    stillborn.pid = SimpleNamespace(remote=lambda *arguments: EngineDiedError("its node has died"))
    pool = pool_of([mortal, Engine(4), stillborn, heir], monkeypatch, restarts=2)
    assert [rollout.policy_version for rollout in pool.submit(PROMPTS, seed=1).result()] == [5, 4, 5, 4, 5, 4, 3]
    with pytest.raises(RolloutError, match="max_restarts"):
        pool.replace(0, heir)


def test_an_engine_that_cannot_get_the_weights_waits_for_those_that_come_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a node has taken both an engine and the learner, which owned the weights: another engine would find no room beside it."""
    mortal, heir = Engine(3, life=1), Engine(5)
    heir.load_policy = SimpleNamespace(remote=lambda *arguments: RolloutError("the owner of the weights is dead"))
    pool = pool_of([mortal, Engine(4), heir], monkeypatch, restarts=1)
    pool.load(WEIGHTS, 3)
    with pytest.raises(RolloutError, match="the owner of the weights is dead"):
        pool.submit(PROMPTS, seed=1).result()
    assert pool.engines[0] is mortal
    pool.discard()
    assert pool.replace(0, mortal) is heir


def test_of_two_lost_engines_each_is_succeeded_once_and_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """The learner, lost with them, owned the weights: the heir of the second one waits for others, and the first one is asked next."""
    first, second, heir, next_heir, places = Engine(3), Engine(4), Engine(5), Engine(6), list[int]()
    heir.load_policy = SimpleNamespace(remote=lambda *arguments: RolloutError("the owner of the weights is dead"))
    pool = pool_of([first, second, heir, next_heir], monkeypatch)
    start = pool._start
    monkeypatch.setattr(pool, "_start", lambda place: places.append(place) or start(place))
    pool.load(WEIGHTS, 3)
    with pytest.raises(RolloutError, match="the owner of the weights is dead"):
        pool.replace(1, second)
    pool.discard()
    assert (pool.replace(0, first), pool.replace(1, second), places) == (heir, next_heir, [1, 0])


def test_an_engine_that_joins_without_getting_the_weights_tries_again(monkeypatch: pytest.MonkeyPatch) -> None:
    first, late, answers = Engine(3), SlowEngine(4), [RolloutError("the owner of the weights is dead"), None]
    late.load_policy = SimpleNamespace(remote=lambda *arguments: answers.pop(0))
    pool = growing_pool([first, late], monkeypatch, [])
    pool.load(WEIGHTS, 7)
    late.up = True
    with pytest.raises(RolloutError, match="the owner of the weights is dead"):
        pool.submit(PROMPTS, seed=1)
    assert pool.engines == [first]
    pool.submit(PROMPTS, seed=1)
    assert pool.engines == [first, late]


def test_nobody_replaces_an_engine_for_a_cancelled_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the loop has failed and the pool is being closed while another thread still follows the batch."""
    mortal, heir = Engine(3, life=1), Engine(5)
    pool = pool_of([mortal, Engine(4), heir], monkeypatch)
    sampling = pool.submit(PROMPTS, seed=1)
    sampling.cancel()
    with pytest.raises(EngineDiedError):
        sampling.result()
    assert heir not in pool.engines and not heir.seeds


@pytest.mark.parametrize(("gpus", "colocate", "waits"), [(0, False, False), (1, False, False), (0.5, False, True), (1, True, True)])
def test_on_a_gpu_that_others_come_to_as_well_engines_load_first(
    gpus: float, colocate: bool, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM gives up where another process frees memory of the GPU while it loads, and takes what others allocate for its own."""
    journal: list[str] = []
    actor = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda *_, **__: "engine"))
    monkeypatch.setattr(rollout_pool, "ray", SimpleNamespace(remote=lambda _: actor, kill=lambda _: None))
    monkeypatch.setattr(VllmRolloutPool, "ready", lambda self: journal.append("ready"))
    config = RolloutConfig(engines=WorkersConfig(gpus=gpus), colocate=colocate)
    with rollout_pool.rollout_pool("policy", config, precision="bf16", max_prompt_length=8, eos_ids=[1], seed=0, deadline_seconds=1):
        journal.append("others")
    assert journal == (["ready", "others"] if waits else ["others"])
