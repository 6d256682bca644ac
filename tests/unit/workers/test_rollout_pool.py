"""How a batch is dealt over engines and put together again."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from app.experience import Prompt
from app.workers import rollout
from app.workers.rollout import VllmRolloutPool


@pytest.mark.parametrize("prompts", [1, 2, 7])
@pytest.mark.parametrize("engines", [1, 3])
def test_samples_come_back_in_order(prompts: int, engines: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def sample(ids: Sequence[Any], settings: Sequence[Any]) -> list[Any]:
        asked.append(len(ids))
        return [np.append(row, one["max_tokens"]) for row, one in zip(ids, settings, strict=True)]

    monkeypatch.setattr(rollout, "collect", lambda calls, **_: calls)
    pool = VllmRolloutPool([SimpleNamespace(sample=SimpleNamespace(remote=sample))] * engines, deadline_seconds=1)
    answers = pool.sample([np.array([k], np.int32) for k in range(prompts)], [{"max_tokens": 10 + k} for k in range(prompts)])
    assert [answer.tolist() for answer in answers] == [[k, 10 + k] for k in range(prompts)]
    assert sum(asked) == prompts
    assert len(asked) == min(engines, prompts), "no engine is called for nothing"


def test_every_rollout_carries_the_version_of_the_engine_that_sampled_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def engine(version: int) -> Any:
        def generate(prompts: Sequence[Any], seeds: Sequence[int]) -> Any:
            return version, [(np.array([version], np.int32), np.array([-1.0], np.float32), "stop") for _ in prompts]

        return SimpleNamespace(generate=SimpleNamespace(remote=generate))

    monkeypatch.setattr("app.workers.pending.collect", lambda calls, **_: list(calls))
    pool = VllmRolloutPool([engine(3), engine(4)], deadline_seconds=1)
    rollouts = pool.submit([Prompt(str(k), "", np.array([k], np.int32)) for k in range(5)], seed=1).result()
    assert [rollout.policy_version for rollout in rollouts] == [3, 4, 3, 4, 3]
    assert all(rollout.ids.tolist() == [rollout.policy_version] for rollout in rollouts)
