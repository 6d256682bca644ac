"""The learner without its processes: how rows are dealt, how answers are put together, what the first step is held to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from app.config.ppo import PpoConfig
from app.data.batch_order import PassLimit
from app.errors import LearnerError
from app.experience import Minibatch, PolicyOutputs, TokenBatch
from app.workers.actor_critic import ActorCritic, minibatch_rows
from app.workers.learner import LearnerSpec, LearnerWorker
from app.workers.learner_group import RayLearner


def test_every_row_is_learnt_from_once_an_epoch() -> None:
    tokens = tokens_of(12)
    tokens.prompt_lengths_B[:] = torch.tensor([5, 1, 9, 3, 3, 7, 2, 8, 6, 4, 5, 1])

    def hand(rank: int) -> ActorCritic:
        return models_of(rank, 2)

    for epoch in (0, 1):
        minibatches = minibatch_rows(12, 3, seed=4, epoch=epoch)
        assert sorted(torch.cat(minibatches).tolist()) == list(range(12))
        for rows in minibatches:
            hands = [hand(rank)._micro_batches(rows, tokens) for rank in (0, 1)]
            assert sorted(torch.cat([*hands[0], *hands[1]]).tolist()) == sorted(rows.tolist())
    assert not torch.equal(minibatch_rows(12, 1, seed=4, epoch=0)[0], minibatch_rows(12, 1, seed=4, epoch=1)[0])


def models_of(rank: int, world: int) -> ActorCritic:
    """A rank without any models."""
    limit, device = PassLimit(rows=1), torch.device("cpu")
    return ActorCritic(None, None, PpoConfig(), limit, temperature=1.0, seed=0, rank=rank, world=world, device=device)


def tokens_of(rows: int) -> TokenBatch:
    mask_BT = torch.ones(rows, 2, dtype=torch.bool)
    return TokenBatch(torch.ones(rows, 3).long(), torch.ones(rows, 3).bool(), torch.ones(rows).long(), mask_BT.sum(1), mask_BT)


@pytest.mark.parametrize("critic", [True, False])
def test_answers_of_the_ranks_come_back_in_row_order(critic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(self: RayLearner, method: str, *args: Any) -> list[Any]:
        hands = [torch.tensor([3, 0]), torch.tensor([1, 2])]
        return [(rows, rows[:, None].float().expand(2, 2), -rows[:, None].float().expand(2, 2) if critic else None) for rows in hands]

    monkeypatch.setattr(RayLearner, "_each", answer)
    monkeypatch.setattr("ray.put", lambda x: x)
    logprobs_BT, values_BT = RayLearner([], [], deadline_seconds=1).inspect(tokens_of(4))
    assert logprobs_BT.tolist() == [[0, 0], [1, 1], [2, 2], [3, 3]]
    assert (None if values_BT is None else values_BT[:, 0].tolist()) == ([0, -1, -2, -3] if critic else None)


@pytest.mark.parametrize(("apart", "refused"), [(0.0, False), (9e-4, False), (-2e-3, True), (math.nan, True)])
def test_the_first_step_must_start_from_the_proximal_log_probs(apart: float, refused: bool) -> None:
    models = models_of(0, 1)
    zeros_BT = torch.zeros(2, 2)
    tokens = tokens_of(2)
    tokens.mask_BT[0, 1] = False
    minibatch = Minibatch(tokens, zeros_BT, zeros_BT, zeros_BT, None, zeros_BT, zeros_BT)
    logprobs_BT = torch.tensor([[0.0, 77.0], [0.0, apart]])  # what is masked does not matter
    outputs = PolicyOutputs(logprobs_BT, None, zeros_BT)
    if refused:
        with pytest.raises(LearnerError, match=r"turn dropout off"):
            models._mismatch(outputs, minibatch)
    else:
        assert models._mismatch(outputs, minibatch) == pytest.approx(abs(apart))


@pytest.fixture
def journal(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a learner does, and when it gives memory of its GPU back."""
    said: list[str] = []
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: said.append("given back"))
    monkeypatch.setattr("app.workers.deepspeed_engine.load_engine", lambda engine, folder: said.append("loaded"))
    monkeypatch.setattr("app.workers.deepspeed_engine.apply_settings", lambda engine, optimizer: None)
    return said


def worker_of(shares: bool, journal: list[str]) -> LearnerWorker:
    worker: Any = LearnerWorker()
    worker._spec = LearnerSpec("", "", "bf16", 1.0, PpoConfig(), shares_gpu=shares)
    worker._outbox = SimpleNamespace(push=lambda: journal.append("pushed") or "policy")
    worker._sender = SimpleNamespace(send=lambda version: journal.append("sent"))
    worker._models = SimpleNamespace(engines={"policy": None}, forget_passes=lambda: None)
    return cast(LearnerWorker, worker)


@pytest.mark.parametrize("shares", [True, False])
def test_the_memory_of_a_gpu_is_given_back_before_the_engine_on_it_wakes(shares: bool, journal: list[str]) -> None:
    def done(work: Callable[[LearnerWorker], Any], *expected: str) -> bool:
        journal.clear()
        work(worker_of(shares, journal))
        return journal == [said for said in expected if shares or said != "given back"]

    assert done(lambda worker: worker.pushed_policy(), "pushed", "given back")  # the update's
    assert done(lambda worker: worker.send_policy(3), "given back", "sent", "given back")  # it wakes twice: to receive, and to sample
    assert done(lambda worker: worker.load("folder"), "loaded", "given back")


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_rank_that_writes_the_policy_holds_all_of_it(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight ranks of one node would hold eight copies of a 12B model in its memory; all take part in gathering it."""
    gathered: list[str] = []
    copied: list[str] = []
    written: list[str] = []

    def merged() -> Iterator[tuple[str, Any]]:
        for name in ("a", "b"):
            gathered.append(name)
            yield name, SimpleNamespace(cpu=lambda name=name: copied.append(name) or torch.ones(1))

    monkeypatch.setattr("app.models.load.load_tokenizer", lambda path, trust: "tokenizer")
    monkeypatch.setattr("app.models.saving.save_folder", lambda folder, model, tokenizer, state_dict: written.extend(state_dict))
    worker: Any = worker_of(False, [])
    worker._outbox, worker._rank = SimpleNamespace(merged=merged), rank
    worker._models.engines = {"policy": SimpleNamespace(module=SimpleNamespace(language_model="model"))}
    worker.export("folder")
    assert gathered == ["a", "b"]
    assert copied == written == ([] if rank else ["a", "b"])
