"""What the client does with a service that is busy, refuses or changes: a replica of this test answers instead of a real one."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.exceptions import RayActorError

from app.config.scoring import ScoringConfig
from app.config.served_models import REWARD
from app.errors import BadRequestError, NotReadyError, OverloadedError, ScoringError, ScoringTimeoutError
from app.workers import scoring_client, watchdog
from app.workers.scoring_client import ServeScorer
from app.workers.scoring_messages import ModelIdentity, ScoringAnswer, ScoringRequest

OLD, NEW = ModelIdentity(REWARD, "1", "a" * 32), ModelIdentity(REWARD, "2", "b" * 32)

Reply = Callable[[ScoringRequest, int], ScoringAnswer]


def first_tokens(request: ScoringRequest, model: ModelIdentity = OLD) -> ScoringAnswer:
    """The score of a sequence is its first token."""
    starts = np.cumsum(request.lengths) - request.lengths
    return ScoringAnswer(request.ids[starts].astype(np.float32), model)


class Replica:
    """Answers what `reply` says to a request, by how many came before it."""

    def __init__(self, reply: Reply = lambda request, number: first_tokens(request)) -> None:
        self.requests: list[ScoringRequest] = []
        self.unanswered = self.most_unanswered = 0
        self.infer = SimpleNamespace(remote=self._remote)
        self._reply = reply

    def _remote(self, request: ScoringRequest) -> Any:
        number = len(self.requests)
        self.requests.append(request)
        self.unanswered += 1
        self.most_unanswered = max(self.most_unanswered, self.unanswered)

        def result(timeout_s: float) -> ScoringAnswer:
            self.unanswered -= 1
            return self._reply(request, number)

        return SimpleNamespace(result=result, cancel=lambda: None)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the client slept, without sleeping."""
    slept: list[float] = []
    monkeypatch.setattr(scoring_client, "time", SimpleNamespace(sleep=slept.append, monotonic=lambda: 0.0))
    return slept


def client(replica: Replica, **settings: Any) -> ServeScorer:
    scorer = ServeScorer("scoring", ScoringConfig(max_batch_tokens=4, **settings))  # one sequence a request
    scorer._handles[REWARD] = replica  # type: ignore[assignment]
    return scorer


def sequences(*first: int) -> list[np.ndarray]:
    return [np.array([token, 0, 0, 0], dtype=np.int32) for token in first]


def failing(*failures: Exception) -> Reply:
    """A service that fails so many times first."""

    def reply(request: ScoringRequest, number: int) -> ScoringAnswer:
        if number < len(failures):
            raise failures[number]
        return first_tokens(request)

    return reply


def test_one_client_has_a_bounded_number_of_requests_under_way() -> None:
    replica = Replica()
    scorer = client(replica, max_in_flight=3)
    calls = [scorer.scores(sequences(*range(10 * number, 10 * number + 5))) for number in range(3)]
    assert len(replica.requests) == 3
    assert calls[2].result() == [20, 21, 22, 23, 24], "a call that is waited for goes on, room or not"
    assert [call.result() for call in calls[:2]] == [[0, 1, 2, 3, 4], [10, 11, 12, 13, 14]]
    assert len(replica.requests) == 15
    assert replica.most_unanswered == 4


def test_a_call_that_nobody_waits_for_leaves_its_room() -> None:
    replica = Replica()
    scorer = client(replica, max_in_flight=3)
    dropped = scorer.scores(sequences(1, 2, 3))
    del dropped
    scorer.scores(sequences(4, 5, 6))
    assert len(replica.requests) == 6


@pytest.mark.parametrize("failure", [NotReadyError("loading"), RayActorError(), ScoringTimeoutError("late"), TimeoutError()])
def test_what_may_pass_is_asked_again(failure: Exception, pauses: list[float]) -> None:
    assert client(Replica(failing(failure, failure))).scores(sequences(7)).result() == [7]
    assert 0.1 <= pauses[0] <= 0.3 and 0.2 <= pauses[1] <= 0.6


def test_an_overloaded_service_is_asked_again_when_it_said_so(pauses: list[float]) -> None:
    assert client(Replica(failing(OverloadedError("full", 2.5)))).scores(sequences(7)).result() == [7]
    assert pauses == [2.5]


def test_what_would_fail_again_is_not_asked_again() -> None:
    replica = Replica(failing(BadRequestError("ids")))
    with pytest.raises(BadRequestError, match="scoring service scoring, deployment reward: ids"):
        client(replica).scores(sequences(7)).result()
    assert len(replica.requests) == 1


def test_a_service_that_keeps_failing_is_an_error_of_its_kind(pauses: list[float]) -> None:
    with pytest.raises(OverloadedError, match="failed 3 times, last: full") as failed:
        client(Replica(failing(*[OverloadedError("full", 9.0)] * 3)), retries=2).scores(sequences(7)).result()
    assert pickle.loads(pickle.dumps(failed.value)).retry_after == 9.0


def test_a_service_that_does_not_answer_leaves_stacks(pauses: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "write_stacks", lambda file, headline: file.touch())
    late = client(Replica(failing(*[TimeoutError()] * 3)), retries=2)
    with watchdog.watching(tmp_path, note=pytest.fail), pytest.raises(ScoringTimeoutError) as failed:
        late.scores(sequences(7)).result()
    (file,) = tmp_path.iterdir()
    assert str(failed.value).endswith(f"; what every process did is in {file}")


def test_a_call_that_meets_two_versions_asks_the_older_one_again(pauses: list[float]) -> None:
    replica = Replica(lambda request, number: first_tokens(request, OLD if number in (0, 2) else NEW))
    assert client(replica).scores(sequences(1, 2, 3, 4)).result() == [1, 2, 3, 4]
    assert [int(request.ids[0]) for request in replica.requests[4:]] == [1, 3]


def test_versions_that_stay_mixed_are_an_error(pauses: list[float]) -> None:
    replica = Replica(lambda request, number: first_tokens(request, (OLD, NEW)[int(request.ids[0]) % 2]))
    with pytest.raises(NotReadyError, match=r"versions 1 \(aaaaaaaaaaaa\) and 2 \(bbbbbbbbbbbb\) of reward"):
        client(replica).scores(sequences(1, 2)).result()


def test_other_errors_are_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        client(Replica(failing(ZeroDivisionError()))).scores(sequences(7)).result()
    assert issubclass(ScoringTimeoutError, ScoringError)
