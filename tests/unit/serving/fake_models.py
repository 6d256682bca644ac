"""Stand-ins for the handles of deployed models: arithmetic on token ids in place of a forward pass."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from app.errors import BadRequestError, TooLongError
from app.workers.scoring_messages import ModelDescription, ModelIdentity, ScoringAnswer, ScoringRequest

VOCABULARY, CONTEXT = 50, 16


class FakeResponse:
    """Like a DeploymentResponse: awaited once, or cancelled."""

    def __init__(self, work: Awaitable[Any]) -> None:
        self._work = work
        self.cancelled = False

    def __await__(self) -> Generator[Any, None, Any]:
        return self._work.__await__()

    def cancel(self) -> None:
        self.cancelled = True


@dataclass
class FakeMethod:
    call: Callable[..., Awaitable[Any]]

    def remote(self, *arguments: Any) -> FakeResponse:
        self.last = FakeResponse(self.call(*arguments))
        return self.last


class FakeModel:
    """reward: the sum of a sequence's ids; logprobs: minus the id that follows; logits: the id, in every entry of the vocabulary.

    failures: raised by the next calls, one each. asked: the requests that arrived.
    """

    def __init__(self, description: ModelDescription) -> None:
        self.description = description
        self.failures: list[Exception] = []
        self.asked: list[ScoringRequest] = []
        self.delay = 0.0
        self.infer, self.describe = FakeMethod(self._infer), FakeMethod(self._describe)

    def swap(self, version: str) -> None:
        self.description = replace(self.description, identity=replace(self.description.identity, version=version))

    async def _describe(self) -> ModelDescription:
        if self.failures:
            raise self.failures.pop(0)
        return self.description

    async def _infer(self, request: ScoringRequest) -> ScoringAnswer:
        self.asked.append(request)
        await asyncio.sleep(self.delay)
        if self.failures:
            raise self.failures.pop(0)
        if request.ids.max() >= VOCABULARY:
            raise BadRequestError(f"token ids up to {request.ids.max()}, the vocabulary is {VOCABULARY}")
        if request.lengths.max() > CONTEXT:
            raise TooLongError(f"a sequence has {request.lengths.max()} tokens, the context is {CONTEXT}")
        rows = np.split(request.ids, np.cumsum(request.lengths)[:-1])
        values = {
            "rewards": lambda: np.array([row.sum() for row in rows], np.float32),
            "logprobs": lambda: np.concatenate([-row[1:] for row in rows]).astype(np.float32),
            "logits": lambda: np.repeat(request.ids[:, None], VOCABULARY, axis=1).astype(np.float16),
        }[request.output]()
        return ScoringAnswer(values, self.description.identity)


def fake_models(path: str = "") -> dict[str, FakeModel]:
    """One of each kind."""
    return {
        kind: FakeModel(ModelDescription(ModelIdentity(kind, "1", f"{kind}-hash"), kind, VOCABULARY, CONTEXT, path, timeout_seconds=5.0))
        for kind in ("reward", "reference")
    }
