"""After a push every engine must compute what the learner computes, and answer under the new version."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest

from app.config.rollout import Transfer
from app.errors import NonFiniteError, WeightPushError
from app.workers.learner_group import RayLearner
from app.workers.pushed_policy import PushedPolicy, Shipment
from app.workers.rollout_pool import VllmRolloutPool
from app.workers.weight_publisher import WeightPublisher

POLICY = PushedPolicy(Shipment((), bytes=100, whole=20), Shipment((), bytes=980, whole=980), scale=2.0, first=False)
CANARIES = [np.arange(4, dtype=np.int32), np.arange(3, dtype=np.int32)]


class Sides:
    """A learner and a pool of engines, of which one is `apart` nats off on the last token of the last canary."""

    def __init__(self, apart: float, engines: int = 2, learner: float = -1.0) -> None:
        self.apart, self.engines, self.learner = apart, engines, learner
        self.calls: list[tuple[Any, ...]] = []

    def logprobs(self, sequences: Sequence[Any]) -> list[Any]:
        return [np.full(len(ids) - 1, self.learner, np.float32) for ids in sequences]

    def pushed_policy(self) -> PushedPolicy:
        return POLICY

    def connect_engines(self, engines: int, transfer: str, *, tensor_parallel: int) -> None:
        self.calls.append(("connect", engines, transfer, tensor_parallel))

    def send_policy(self, version: int) -> None:
        self.calls.append(("send", version))

    def refuse_replacements(self) -> None:
        self.calls.append(("no other engines",))

    def load(self, policy: PushedPolicy, version: int) -> None:
        self.calls.append(("load", policy, version))

    def each(self, method: str, *args: Any) -> list[Any]:
        self.calls.append((method, *args))
        answers = [self.logprobs(CANARIES) for _ in range(self.engines)]
        answers[-1][-1][-1] += self.apart
        return answers


def publisher(sides: Sides) -> WeightPublisher:
    return WeightPublisher(cast(RayLearner, sides), cast(VllmRolloutPool, sides), CANARIES, limit=1e-3)


def test_weights_are_labelled_and_compared() -> None:
    sides = Sides(apart=5e-4)
    metrics = publisher(sides).publish(7)
    assert metrics["push/canary_mismatch"] == pytest.approx(5e-4, rel=1e-3)
    assert (metrics["push/bytes"], metrics["push/share"]) == (100, 0.1)
    assert sides.calls[0] == ("load", POLICY, 7)
    assert sides.calls[1][0] == "logprobs"


@pytest.mark.parametrize("transfer", ["nccl", "ipc"])
def test_from_gpu_to_gpu_the_version_travels_with_the_weights(transfer: Transfer) -> None:
    sides = Sides(apart=5e-4)
    learner, pool = cast(RayLearner, sides), cast(VllmRolloutPool, sides)
    publisher = WeightPublisher(learner, pool, CANARIES, limit=1e-3, transfer=transfer, tensor_parallel=4)
    metrics = publisher.publish(7)
    assert sides.calls == [("no other engines",), ("connect", 2, transfer, 4), ("send", 7), ("logprobs", CANARIES)]
    assert "push/bytes" not in metrics and metrics["push/seconds"] >= 0


@pytest.mark.parametrize("apart", [2e-3, -2e-3, math.nan])
def test_one_engine_that_disagrees_on_one_token_is_enough(apart: float) -> None:
    with pytest.raises(WeightPushError, match="policy version 7"):
        publisher(Sides(apart)).publish(7)


@pytest.mark.parametrize("spoilt", [math.nan, -math.inf])
def test_a_policy_that_is_no_longer_finite_is_no_fault_of_the_push(spoilt: float) -> None:
    """The same weights would be pushed again: it must not look like a lost engine."""
    with pytest.raises(NonFiniteError, match=r"policy version 7 .* lower ppo.policy.lr"):
        publisher(Sides(0.0, learner=spoilt)).publish(7)
