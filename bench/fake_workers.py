"""Rollout engines and learner ranks that compute nothing: real Ray actors with the methods that the pool and the learner call.

Only numpy and ray are imported here, and by engines anywhere, so that hundreds of these processes fit one machine.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, NamedTuple
from unittest.mock import MagicMock

import numpy as np
import ray

LOGPROB = -1.0
"""Of every token, on both sides."""
VOCABULARY = 32_000


class Answer(NamedTuple):
    """What `app.workers.rollout_engine.Sampled` has."""

    ids: Any
    logprobs: Any
    versions: Any
    finish: str


class FakeEngine:
    """An asynchronous actor like `RolloutEngine`: its responses are there at once, each `length` random tokens long."""

    def __init__(self, length: int) -> None:
        self._length, self._version = length, 0
        for module in ("torch", "app.models.adapters"):  # prompts and pushes that arrive here name them, and need nothing of them
            sys.modules.setdefault(module, MagicMock())

    async def generate(self, prompts: Sequence[Any], seeds: Sequence[int]) -> AsyncIterator[list[tuple[int, Answer]]]:
        """No two responses end with the same step, which is the most to carry."""
        versions = np.full(self._length, self._version, dtype=np.int32)
        logprobs = np.full(self._length, LOGPROB, dtype=np.float32)
        for place, seed in enumerate(seeds):
            ids = np.random.default_rng(seed).integers(VOCABULARY, size=self._length, dtype=np.int32)
            yield [(place, Answer(ids, logprobs, versions, "length"))]

    async def logprobs(self, sequences: Sequence[Any]) -> list[Any]:
        return fake_logprobs(sequences)

    async def load_policy(self, policy: Any, version: int) -> None:
        for bucket in policy.trained.buckets:
            await bucket
        self._version = version

    async def pid(self) -> int:
        import os

        return os.getpid()


class FakeLearner:
    """One rank like `LearnerWorker`: it is given every batch and answers for its share of the rows."""

    def place(self, rank: int, world: int, weight_bytes: int) -> None:
        self._rank, self._world, self._weight_bytes = rank, world, weight_bytes

    def inspect(self, tokens: Any) -> tuple[Any, Any, Any]:
        import torch

        rows = torch.arange(self._rank, len(tokens), self._world)
        mask_BT = tokens.mask_BT[rows]
        return rows, torch.where(mask_BT, LOGPROB, 0.0), torch.zeros(mask_BT.shape)

    def update(self, experience: Any, step: int) -> Mapping[str, float]:
        return {"rows": float(len(experience.tokens))}

    def pushed_policy(self) -> Any:
        from app.workers.pushed_policy import PushedPolicy, Shipment

        buckets: tuple[Any, ...] = ()
        if not self._rank and self._weight_bytes:
            buckets = (ray.put({"weight": np.zeros(self._weight_bytes // 4, dtype=np.float32)}),)
        return PushedPolicy(Shipment(buckets, self._weight_bytes, self._weight_bytes), Shipment(), None, first=True)

    def logprobs(self, sequences: Sequence[Any]) -> list[Any]:
        return fake_logprobs(sequences)


class Answered:
    """`Pending` that is there already."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def result(self) -> Any:
        return self._value


class FakeScorer:
    """The scoring service in the controller's own process: a score that depends on the tokens, and log-probs like everybody's."""

    def scores(self, sequences: Sequence[Any]) -> Answered:
        return Answered([float(ids[-1]) / VOCABULARY for ids in sequences])

    def logprobs(self, sequences: Sequence[Any]) -> Answered:
        return Answered(fake_logprobs(sequences))


def fake_logprobs(sequences: Sequence[Any]) -> list[Any]:
    """float32 [S-1] per sequence [S]."""
    return [np.full(len(ids) - 1, LOGPROB, dtype=np.float32) for ids in sequences]
