"""The client of the scoring service: `app.interfaces.Scorer` over Ray Serve handles, with deadlines and retries.

What travels is in app/workers/scoring_messages.py.
"""

from __future__ import annotations

import math
import random
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from app.config.scoring import ScoringConfig
from app.config.served_models import REFERENCE, REWARD
from app.config.serving import Output
from app.errors import BadRequestError, NotReadyError, OverloadedError, ScoringError, ScoringTimeoutError
from app.experience import FloatArray, IntArray
from app.interfaces import Pending
from app.models.forward import padded_batches
from app.workers.pending import last_line
from app.workers.scoring_messages import ScoringAnswer, ScoringRequest
from app.workers.watchdog import where_stacks_are

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.2, 5.0

T = TypeVar("T")


class ServeScorer:
    """Scores and reference log-probs from the Serve application `name`; the scores are those of its model `reward`. Pickles as these
    names and its config, so that any process of the cluster can use it."""

    def __init__(self, name: str, config: ScoringConfig, reward: str = REWARD) -> None:
        self._name, self._reward = name, reward
        self._config = config
        self._handles: dict[str, DeploymentHandle[Any]] = {}
        self.under_way = _UnderWay(config.max_in_flight)
        self._client = uuid.uuid4().hex  # of this process: trials that share the service take turns

    def scores(self, sequences: Sequence[IntArray]) -> Pending[list[float]]:
        """Reward-model score (logit - reward_offset) of each sequence [S].

        `result()` raises ScoringError when a request is refused (its reason is in the message), or not answered after
        `retries` more attempts of `timeout_seconds` each.
        """
        requests = self._requests(self._reward, "rewards", self._config.reward.count, sequences)

        def finish(answers: Sequence[ScoringAnswer]) -> list[float]:
            scores = [math.nan] * len(sequences)
            for request, answer in zip(requests, answers, strict=True):
                for index, score in zip(request.rows, answer.values.tolist(), strict=True):
                    scores[index] = score
            return scores

        return _PendingAnswers(self, requests, finish)

    def logprobs(self, sequences: Sequence[IntArray]) -> Pending[list[FloatArray]]:
        """Per sequence [S]: float32 [S-1], entry t = log p(ids[t+1] | ids[..t]) under the reference policy at the
        service's temperature. Errors as in `scores`."""
        requests = self._requests(REFERENCE, "logprobs", self._config.reference.count, sequences)

        def finish(answers: Sequence[ScoringAnswer]) -> list[FloatArray]:
            rows: dict[int, FloatArray] = {}
            for request, answer in zip(requests, answers, strict=True):
                ends = np.cumsum(request.message.lengths - 1)
                rows.update(zip(request.rows, np.split(answer.values, ends[:-1]), strict=True))
            return [rows[index] for index in range(len(sequences))]

        return _PendingAnswers(self, requests, finish)

    def stats(self) -> dict[str, Mapping[str, int]]:
        """Counters of one replica of each deployment, since it started: requests, batches, sequences, tokens, padding, passes (of
        the model), largest_batch (requests that shared one), pid."""
        return {name: self.handle(name).stats.remote().result(timeout_s=self._config.timeout_seconds) for name in (self._reward, REFERENCE)}

    def handle(self, deployment: str) -> DeploymentHandle[Any]:
        """The Serve handle of a deployment, connected once per process. Raises ScoringError when no such service runs."""
        if deployment not in self._handles:
            try:
                self._handles[deployment] = serve.get_deployment_handle(deployment, app_name=self._name)
            except (KeyError, RayServeException) as error:
                raise ScoringError("no such service runs on this Ray cluster; start it, or join the cluster that runs it") from error
        return self._handles[deployment]

    def describe(self, deployment: str) -> str:
        return f"scoring service {self._name}, deployment {deployment}"

    @property
    def config(self) -> ScoringConfig:
        return self._config

    def _requests(self, deployment: str, output: Output, replicas: int, sequences: Sequence[IntArray]) -> list[_Request]:
        """Requests small enough for one forward pass each, and at least one per replica where there is enough to do."""
        padded = len(sequences) * max((len(sequence) for sequence in sequences), default=0)
        budget = min(self._config.max_batch_tokens, -(-padded // replicas))
        requests = []
        for rows in padded_batches(sequences, budget):
            ids, lengths = flatten([sequences[row] for row in rows])
            message = ScoringRequest(ids, lengths, output, alone=self._config.alone, client=self._client)
            requests.append(_Request(self, deployment, rows, message))
        return requests

    def __getstate__(self) -> tuple[str, ScoringConfig, str]:
        return self._name, self._config, self._reward

    def __setstate__(self, state: tuple[str, ScoringConfig, str]) -> None:
        self.__init__(*state)  # type: ignore[misc]


def flatten(sequences: Sequence[IntArray]) -> tuple[IntArray, IntArray]:
    """All ids in a row and the length of each sequence, both int32. Raises BadRequestError for what is no list of token ids."""
    arrays = [np.asarray(sequence) for sequence in sequences]
    for array in arrays:
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise BadRequestError(f"a sequence of token ids is a one-dimensional integer array, not {array.dtype} {array.shape}")
    ids = np.concatenate(arrays)
    if ids.size and (ids.min() < 0 or ids.max() > np.iinfo(np.int32).max):
        raise BadRequestError(f"token ids range from {ids.min()} to {ids.max()}: ids are non-negative and fit into 32 bits")
    return ids.astype(np.int32), np.array([len(array) for array in arrays], dtype=np.int32)


class _UnderWay:
    """Requests of one client that are sent and not answered: at most `limit`. Those of a call that nobody holds any more leave it
    by themselves."""

    def __init__(self, limit: int) -> None:
        self._limit, self._lock = limit, threading.Lock()
        self._requests: weakref.WeakSet[_Request] = weakref.WeakSet()

    def has_room(self) -> bool:
        with self._lock:
            return len(self._requests) < self._limit

    def enter(self, request: _Request) -> None:
        with self._lock:
            self._requests.add(request)

    def leave(self, request: _Request) -> None:
        with self._lock:
            self._requests.discard(request)


@dataclass(eq=False)
class _Request:
    """One request of a call: which sequences it carries, and its latest attempts. More than one attempt is a hedge."""

    scorer: ServeScorer
    deployment: str
    rows: list[int]
    message: ScoringRequest
    attempts: list[Any] = field(default_factory=list)  # DeploymentResponses under way
    failure: Exception | None = None
    sent: bool = False

    def send(self) -> None:
        """Start an attempt; a failure to start is one more failure of the attempt, told by `wait`."""
        self.sent, self.failure = True, None
        self.scorer.under_way.enter(self)
        try:
            self.attempts.append(self.scorer.handle(self.deployment).infer.remote(self.message))
        except (RayError, RayServeException, ScoringError) as error:
            self.failure = error

    def wait(self) -> ScoringAnswer:
        """The answer. Every attempt has `timeout_seconds` from the moment that its caller waits for it.

        What could not be sent yet is sent now, room or not: two callers that wait for each other's room would wait for ever.
        """
        if not self.attempts and self.failure is None:
            self.send()
        try:
            return self._wait()
        finally:
            self.failure = None
            self.scorer.under_way.leave(self)

    def _wait(self) -> ScoringAnswer:
        config = self.scorer.config
        failure: ScoringError | None = None
        for attempt in range(config.retries + 1):
            if attempt:
                time.sleep(max(pause_before(attempt), getattr(failure, "retry_after", 0.0)))
                self.send()
            try:
                return self._answer(config)
            except Exception as error:  # noqa: BLE001 - which of them are worth another attempt, `as_failure` knows
                failure = as_failure(error, config, self.deployment)
            if not isinstance(failure, WORTH_ANOTHER_ATTEMPT):
                raise self._named(failure, str(failure)) from None
        assert failure is not None
        stacks = where_stacks_are(f"scoring by {self.deployment}") if isinstance(failure, ScoringTimeoutError) else ""
        raise self._named(failure, f"failed {config.retries + 1} times, last: {failure}{stacks}")

    def _answer(self, config: ScoringConfig) -> ScoringAnswer:
        if not self.attempts:
            assert self.failure is not None, "send() comes before wait()"
            raise self.failure
        deadline = time.monotonic() + config.timeout_seconds
        try:
            if config.hedge_after_seconds is not None and self._ended(config.hedge_after_seconds) is None:
                self.send()
            ended = self.attempts[0] if len(self.attempts) == 1 else self._ended(deadline - time.monotonic())
            if ended is None:
                raise TimeoutError
            answer: ScoringAnswer = ended.result(timeout_s=max(0.0, deadline - time.monotonic()))
            return answer
        finally:
            for response in self.attempts:
                response.cancel()  # of what has ended nothing is left to cancel
            self.attempts.clear()

    def _ended(self, seconds: float) -> Any | None:
        """The attempt that has an answer or a failure first; None where none has after so long."""
        deadline = time.monotonic() + seconds
        try:
            references = {each._to_object_ref_sync(_timeout_s=max(0.0, deadline - time.monotonic())): each for each in self.attempts}
        except TimeoutError:  # no replica has taken it yet
            return None
        ready, _ = ray.wait(list(references), num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
        return references[ready[0]] if ready else None

    def _named(self, failure: ScoringError, message: str) -> ScoringError:
        failure.args = (f"{self.scorer.describe(self.deployment)}: {message}", *failure.args[1:])
        return failure


def pause_before(attempt: int) -> float:
    """Seconds to wait before attempt 1, 2, ...: callers that failed together do not come back together."""
    return min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2.0 ** (attempt - 1)) * random.uniform(0.5, 1.5)


WORTH_ANOTHER_ATTEMPT = (OverloadedError, ScoringTimeoutError, NotReadyError)
"""Kinds of failure after which the same request may be answered. Any other would come again."""


def as_failure(error: Exception, config: ScoringConfig, deployment: str) -> ScoringError:
    """What went wrong with an attempt, as the kind of ScoringError that it is. Raises what is none of the service's failures."""
    cause = getattr(error, "cause", error)  # what Ray carries out of a replica
    if isinstance(cause, ScoringError):
        return cause
    if isinstance(error, TimeoutError):
        workers = REFERENCE if deployment == REFERENCE else REWARD
        return ScoringTimeoutError(
            f"no answer within {config.timeout_seconds:g} s; raise scoring.timeout_seconds or scoring.{workers}.count"
        )
    if isinstance(error, BackPressureError):
        return OverloadedError(last_line(error))
    if isinstance(error, (RayError, RayServeException)):
        return NotReadyError(f"{type(error).__name__}: {last_line(error)}")
    raise error


class _PendingAnswers(Generic[T]):
    """A call in flight. `finish` puts the answers of its requests together."""

    def __init__(self, scorer: ServeScorer, requests: Sequence[_Request], finish: Callable[[Sequence[ScoringAnswer]], T]) -> None:
        self._scorer, self._requests, self._finish = scorer, requests, finish
        self._send_what_fits()

    def result(self) -> T:
        """Raises ScoringError, also when the answers still come from several versions of the model after `retries` more attempts."""
        answers: dict[_Request, ScoringAnswer] = {}
        for attempt in range(self._scorer.config.retries + 1):
            if attempt:
                time.sleep(pause_before(attempt))  # the model is being replaced
            for request in self._requests:
                if request not in answers:
                    answers[request] = request.wait()
                    self._send_what_fits()
                    last = answers[request].model
            if all(answer.model == last for answer in answers.values()):
                return self._finish([answers[request] for request in self._requests])
            versions = {answer.model for answer in answers.values()}
            answers = {request: answer for request, answer in answers.items() if answer.model == last}
        names = " and ".join(sorted(f"{model.version} ({model.weights_hash[:12]})" for model in versions))
        raise NotReadyError(f"the answers to one call come from versions {names} of {last.name}: ask again")

    def _send_what_fits(self) -> None:
        for request in self._requests:
            if not request.sent:
                if not self._scorer.under_way.has_room():
                    return
                request.send()
