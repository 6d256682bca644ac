"""A user's reward function in a process of its own: what it raises, what kills it and what hangs costs scores, never the run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from app.errors import ConfigError
from app.rewards.function import FunctionReward
from app.rewards.part import Failed, Sample
from app.workers.rule_processes import RuleProcesses

MODULE = """
import os, time

def score(messages, response):
    if response == "die":
        os._exit(1)
    if response == "hang":
        time.sleep(600)
    return 1.0 / int(response)
"""


def samples(texts: Sequence[str]) -> list[Sample]:
    return [Sample((), text, np.zeros(1, np.int32), True) for text in texts]


def test_exceptions_deaths_and_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "killing_rewards.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    processes = RuleProcesses("mine", FunctionReward(type="function", function="killing_rewards:score", deadline_seconds=20))
    try:
        processes.ready(60)
        one, two, zero, four = processes.submit(samples(["1", "2", "0", "4"])).result()
        assert (one, two, four) == (1.0, 0.5, 0.25)
        assert zero == Failed("ZeroDivisionError: float division by zero")
        # Twenty samples go in chunks of three: the one that kills its process costs nobody else's score.
        pending = processes.submit(samples(["1"] * 4 + ["die"] + ["2"] * 15))
        behind = processes.submit(samples(["4"] * 3))  # already in flight when the process dies
        scores = pending.result()
        assert scores[:4] + scores[5:] == [1.0] * 4 + [0.5] * 15, scores
        assert isinstance(scores[4], Failed) and "process" in scores[4].reason
        assert behind.result() == [0.25] * 3
    finally:
        processes.close()
    processes = RuleProcesses("mine", FunctionReward(type="function", function="killing_rewards:score", deadline_seconds=1.5, processes=2))
    try:
        processes.ready(60)
        pending = processes.submit(samples(["1", "hang", "2", "4"]))  # two go to each process
        time.sleep(1)
        next_batch = processes.submit(samples(["5", "8"]))
        first, hung, third, behind = pending.result()
        assert (first, third) == (1.0, 0.5)
        assert hung == behind == Failed("no score within deadline_seconds = 1.5")
        assert next_batch.result()[0] == 0.2
        processes.ready(60)
        assert processes.submit(samples(["1", "2"])).result() == [1.0, 0.5]
    finally:
        processes.close()


def test_a_function_that_only_the_driver_has_is_refused_at_the_start() -> None:
    processes = RuleProcesses("mine", FunctionReward(type="function", function="nowhere_rewards:score"))
    with pytest.raises(ConfigError, match=r"reward part mine .*nowhere_rewards"):
        processes.ready(60)
    processes.close()
