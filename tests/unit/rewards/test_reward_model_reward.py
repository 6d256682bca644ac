"""The learned reward: order, token ids, and what becomes of failures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from app.errors import DeadlineError, ModelError, ScoringError, ScoringTimeoutError
from app.experience import FinishReason, FloatArray, IntArray, Prompt, Rollout
from app.rewards.part import Failed
from app.rewards.reward_model import RewardModelReward


@dataclass
class Answer:
    value: list[float] | Exception

    def result(self) -> list[float]:
        if isinstance(self.value, Exception):
            raise self.value
        return self.value


@dataclass
class FakeScorer:
    """Scores a sequence by the sum of its ids; fails any request that holds a sequence starting with a poisoned id."""

    poisoned: frozenset[int] = frozenset()
    error: type[Exception] = ScoringError
    requests: list[int] = field(default_factory=list)

    def scores(self, sequences: Sequence[IntArray]) -> Answer:
        self.requests.append(len(sequences))
        if any(int(sequence[0]) in self.poisoned for sequence in sequences):
            return Answer(self.error("reward replica died: restart it"))
        return Answer([math.inf if sequence[0] == 99 else float(sequence.sum()) for sequence in sequences])

    def logprobs(self, sequences: Sequence[IntArray]) -> Answer:
        raise AssertionError("a reward asks for scores only")


def rollout(prompt: int, *response: int) -> Rollout:
    logprobs: FloatArray = np.zeros(len(response), dtype=np.float32)
    ids = np.array(response, dtype=np.int32)
    return Rollout(Prompt("p", "", np.array([prompt], dtype=np.int32)), 0, ids, logprobs, FinishReason.STOP, np.zeros(len(ids), np.int32))


ROLLOUTS = [rollout(1, 10), rollout(2, 20, 20), rollout(3, 30)]


def twice(rollout: Rollout) -> IntArray:
    """What a model of another tokenizer reads."""
    if rollout.prompt.ids[0] == 2:
        raise ModelError("its chat template refuses the conversation")
    return np.repeat(rollout.sequence, 2)


def test_a_model_of_another_tokenizer_reads_what_is_written_for_it() -> None:
    scorer = FakeScorer()
    assert RewardModelReward(scorer, twice).score(ROLLOUTS).result() == [22.0, Failed("its chat template refuses the conversation"), 66.0]
    assert scorer.requests == [2]


def test_where_nothing_can_be_written_for_it_nothing_is_asked() -> None:
    scorer = FakeScorer()
    assert RewardModelReward(scorer, twice).score(ROLLOUTS[1:2]).result() == [Failed("its chat template refuses the conversation")]
    assert scorer.requests == []


def test_what_cannot_be_written_keeps_its_place_when_a_request_is_split() -> None:
    scores = RewardModelReward(FakeScorer(poisoned=frozenset({3})), twice).score(ROLLOUTS).result()
    assert scores[0] == 22.0
    assert [isinstance(score, Failed) and score.reason.partition(":")[0] for score in scores[1:]] == [
        "its chat template refuses the conversation",
        "reward replica died",
    ]


def test_scores_prompt_and_response_in_one_request() -> None:
    scorer = FakeScorer()
    assert RewardModelReward(scorer).score(ROLLOUTS).result() == [11.0, 42.0, 33.0]
    assert scorer.requests == [3]


def test_work_is_in_flight_before_the_result_is_asked_for() -> None:
    scorer = FakeScorer()
    RewardModelReward(scorer).score(ROLLOUTS)
    assert scorer.requests == [3]


def test_one_bad_rollout_costs_only_its_own_score() -> None:
    scorer = FakeScorer(poisoned=frozenset({2}))
    scores = RewardModelReward(scorer).score(ROLLOUTS).result()
    assert scores[0] == 11.0
    assert scores[1] == Failed("reward replica died: restart it")
    assert scores[2] == 33.0
    assert scorer.requests == [3, 1, 1, 1]


def test_a_dead_service_fails_every_score_with_its_reason() -> None:
    scores = RewardModelReward(FakeScorer(poisoned=frozenset({1, 2, 3}))).score(ROLLOUTS).result()
    assert scores == [Failed("reward replica died: restart it")] * 3


def test_a_service_that_does_not_answer_is_waited_for_once() -> None:
    """Not once more for each rollout: of thousands that would be days."""
    scorer, late = FakeScorer(poisoned=frozenset({1}), error=ScoringTimeoutError), Failed("reward replica died: restart it")
    assert RewardModelReward(scorer).score(ROLLOUTS).result() == [late] * 3
    assert RewardModelReward(scorer, twice).score(ROLLOUTS).result() == [late, Failed("its chat template refuses the conversation"), late]
    assert scorer.requests == [3, 2]


def test_a_service_that_stops_answering_while_rollouts_are_asked_one_by_one_is_waited_for_once() -> None:
    @dataclass
    class Waited(Answer):
        waits: list[Answer]

        def result(self) -> list[float]:
            self.waits.append(self)
            return super().result()

    class Dying(FakeScorer):
        def scores(self, sequences: Sequence[IntArray]) -> Answer:
            first = int(sequences[0][0]) == 1
            return Waited(([7.0] if first else ScoringTimeoutError("late")) if len(sequences) == 1 else ScoringError("gone"), waits)

    waits: list[Answer] = []
    assert RewardModelReward(Dying()).score(ROLLOUTS).result() == [7.0, Failed("late"), Failed("late")]
    assert len(waits) == 3


def test_other_errors_pass_through() -> None:
    with pytest.raises(DeadlineError):
        RewardModelReward(FakeScorer(poisoned=frozenset({2}), error=DeadlineError)).score(ROLLOUTS).result()


def test_an_infinite_score_is_a_failed_one() -> None:
    scores = RewardModelReward(FakeScorer()).score([rollout(99, 1), rollout(1, 1)]).result()
    assert scores == [Failed("the model gave inf"), 2.0]
