"""How a batch is dealt over engines and put together again."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from app.config.ppo import RolloutConfig
from app.config.shared import WorkersConfig
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
    engine = SimpleNamespace(sample=SimpleNamespace(remote=sample))
    config = RolloutConfig(engines=WorkersConfig(count=engines))
    pool = VllmRolloutPool(lambda k: engine, config, deadline_seconds=1, note=print)
    answers = pool.sample([np.array([k], np.int32) for k in range(prompts)], [{"max_tokens": 10 + k} for k in range(prompts)])
    assert [answer.tolist() for answer in answers] == [[k, 10 + k] for k in range(prompts)]
    assert sum(asked) == prompts
    assert len(asked) == min(engines, prompts), "no engine is called for nothing"
