"""Rules that read the response: what they score, and what a function of the user's may do."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from app.errors import ConfigError
from app.rewards import REWARDS
from app.rewards.function import FunctionReward
from app.rewards.length import LengthReward
from app.rewards.part import Failed, RulePart, Sample
from app.rewards.pattern import PatternReward
from app.rewards.repetition import RepetitionReward

MODULE = """
import math

def politeness(messages, response):
    assert messages == [{"role": "user", "content": "hi"}]
    return response.count("please")

def length(messages, response, *, ids):
    return len(ids)

def moody(messages, response):
    return {"raise": lambda: 1 / 0, "nan": lambda: math.nan, "word": lambda: "much"}.get(response, lambda: True)()

def one_argument(messages):
    return 0.0

class Holder:
    constant = 3.0
    @staticmethod
    def score(messages, response):
        return 2.0
"""


def sample(text: str = "", ids: tuple[int, ...] = ()) -> Sample:
    return Sample(({"role": "user", "content": "hi"},), text, np.array(ids, np.int32), True)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module in the working directory."""
    (tmp_path / "my_rewards.py").write_text(MODULE)
    (tmp_path / "broken_rewards.py").write_text("raise RuntimeError('no licence')")
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    yield "my_rewards"
    sys.path[:] = path
    sys.modules.pop("my_rewards", None)


def test_every_kind_is_listed_under_its_own_name() -> None:
    for name, kind in REWARDS.items():
        assert kind.model_fields["type"].annotation.__args__ == (name,)  # type: ignore[union-attr]


@pytest.mark.parametrize(("tokens", "score"), [(0, -1.0), (3, -0.5), (5, 0.0), (8, 0.0), (9, -0.25), (11, -0.75), (40, -1.0)])
def test_length(tokens: int, score: float) -> None:
    rule = LengthReward(type="length", minimum=5, maximum=8, slack=4)
    assert rule.score([sample(ids=(1,) * tokens)]) == [score]


def test_pattern() -> None:
    texts = [sample("Yes, sure"), sample("yes"), sample("no")]
    assert PatternReward(type="pattern", pattern="(?i)^yes").score(texts) == [1.0, 1.0, 0.0]
    assert PatternReward(type="pattern", pattern="(?i)yes", whole=True, found=-2.0, missing=0.5).score(texts) == [0.5, -2.0, 0.5]


@pytest.mark.parametrize(("ids", "score"), [((1, 2, 3, 4), 0.0), ((7, 7, 7, 7), -2 / 3), ((1, 2, 1, 2), -1 / 3), ((1,), 0.0), ((), 0.0)])
def test_repetition(ids: tuple[int, ...], score: float) -> None:
    assert RepetitionReward(type="repetition", ngram=2).score([sample(ids=ids)]) == pytest.approx([score])


@pytest.mark.parametrize(("name", "scores"), [("politeness", [1.0, 0.0]), ("length", [2.0, 0.0]), ("Holder.score", [2.0, 2.0])])
def test_a_function_gets_messages_text_and_ids_where_it_asks_for_them(module: str, name: str, scores: list[float]) -> None:
    rule = FunctionReward(type="function", function=f"{module}:{name}")
    assert rule.score([sample("please", (1, 2)), sample("now")]) == scores


def test_what_a_function_raises_or_returns_besides_numbers_is_a_failed_score(module: str) -> None:
    rule = FunctionReward(type="function", function=f"{module}:moody")
    raised, nan, word, fine = rule.score([sample("raise"), sample("nan"), sample("word"), sample("")])
    assert raised == Failed("ZeroDivisionError: division by zero")
    assert nan == Failed("it returned nan")
    assert isinstance(word, Failed) and word.reason.startswith("ValueError: could not convert")
    assert fine == 1.0


@pytest.mark.parametrize(
    ("function", "parts"),
    [
        ("nowhere_rewards:f", ["No module named 'nowhere_rewards'", "PYTHONPATH"]),
        ("broken_rewards:f", ["RuntimeError: no licence"]),
        ("my_rewards:rudeness", ["my_rewards has no rudeness"]),
        ("my_rewards:Holder.constant", ["float, not a function"]),
        ("my_rewards:one_argument", ["too many positional arguments", "conversation"]),
        ("builtins:max", ["cannot be called (no signature found", "conversation", "in Python"]),
    ],
)
@pytest.mark.usefixtures("module")
def test_a_function_that_cannot_be_called_is_found_early(function: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        FunctionReward(type="function", function=function).check()
    assert all(part in str(caught.value) for part in [function, *parts]), caught.value


def test_a_rule_without_a_score_is_none() -> None:
    with pytest.raises(NotImplementedError):
        RulePart(type="length").score([sample()])
