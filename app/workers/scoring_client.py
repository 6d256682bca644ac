"""The client of the scoring service: `app.interfaces.Scorer` over Ray Serve handles, with deadlines and retries.

A request carries token ids as one flat int32 array and the sequences' lengths; the answer is one flat float32 array.
Both travel through Ray's object store without conversion.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from app.config.ppo import ScoringConfig
from app.errors import ScoringError
from app.experience import FloatArray, IntArray
from app.interfaces import Pending
from app.models.forward import padded_batches
from app.workers.pending import last_line

REWARD, REFERENCE = "reward", "reference"
"""Names of the two deployments."""

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.2, 5.0

T = TypeVar("T")


class ServeScorer:
    """Scores and reference log-probs from the Serve application `name`. Pickles as its name and config, so that any
    process of the cluster can use it."""

    def __init__(self, name: str, config: ScoringConfig) -> None:
        self._name = name
        self._config = config
        self._handles: dict[str, DeploymentHandle[Any]] = {}

    def scores(self, sequences: Sequence[IntArray]) -> Pending[list[float]]:
        """Reward-model score (logit - reward_offset) of each sequence [S].

        `result()` raises ScoringError when a request is refused (its reason is in the message), or not answered after
        `retries` more attempts of `timeout_seconds` each.
        """
        requests = self._send_all(REWARD, self._config.reward.count, sequences)

        def finish(answers: Sequence[FloatArray]) -> list[float]:
            scores = [0.0] * len(sequences)
            for request, answer in zip(requests, answers, strict=True):
                for index, score in zip(request.rows, answer.tolist(), strict=True):
                    scores[index] = score
            return scores

        return _PendingAnswers(requests, finish)

    def logprobs(self, sequences: Sequence[IntArray]) -> Pending[list[FloatArray]]:
        """Per sequence [S]: float32 [S-1], entry t = log p(ids[t+1] | ids[..t]) under the reference policy at the
        service's temperature. Errors as in `scores`."""
        requests = self._send_all(REFERENCE, self._config.reference.count, sequences)

        def finish(answers: Sequence[FloatArray]) -> list[FloatArray]:
            rows: dict[int, FloatArray] = {}
            for request, answer in zip(requests, answers, strict=True):
                ends = np.cumsum([len(sequence) - 1 for sequence in request.sequences])
                rows.update(zip(request.rows, np.split(answer, ends[:-1]), strict=True))
            return [rows[index] for index in range(len(sequences))]

        return _PendingAnswers(requests, finish)

    def stats(self) -> dict[str, Mapping[str, int]]:
        """Counters of one replica of each deployment, since it started: requests, batches, sequences, tokens, passes (of
        the model), padded_tokens (what these computed), largest_batch (requests that shared one), pid."""
        return {name: self.handle(name).stats.remote().result(timeout_s=self._config.timeout_seconds) for name in (REWARD, REFERENCE)}

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

    def _send_all(self, deployment: str, replicas: int, sequences: Sequence[IntArray]) -> list[_Request]:
        """Requests small enough for one forward pass each, and at least one per replica where there is enough to do."""
        padded = len(sequences) * max((len(sequence) for sequence in sequences), default=0)
        budget = min(self._config.max_batch_tokens, -(-padded // replicas))
        batches = padded_batches(sequences, budget)
        requests = [_Request(self, deployment, rows, [sequences[row] for row in rows]) for rows in batches]
        for request in requests:
            request.send()
        return requests

    def __getstate__(self) -> tuple[str, ScoringConfig]:
        return self._name, self._config

    def __setstate__(self, state: tuple[str, ScoringConfig]) -> None:
        self.__init__(*state)  # type: ignore[misc]


def flatten(sequences: Sequence[IntArray]) -> tuple[IntArray, IntArray]:
    """All ids in a row and the length of each sequence, both int32. Raises ScoringError for what is no list of token ids."""
    arrays = [np.asarray(sequence) for sequence in sequences]
    for array in arrays:
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise ScoringError(f"a sequence of token ids is a one-dimensional integer array, not {array.dtype} {array.shape}")
    ids = np.concatenate(arrays)
    if ids.size and (ids.min() < 0 or ids.max() > np.iinfo(np.int32).max):
        raise ScoringError(f"token ids range from {ids.min()} to {ids.max()}: ids are non-negative and fit into 32 bits")
    return ids.astype(np.int32), np.array([len(array) for array in arrays], dtype=np.int32)


@dataclass
class _Request:
    """One request in flight: which sequences of the call it carries, and its latest attempt."""

    scorer: ServeScorer
    deployment: str
    rows: list[int]
    sequences: Sequence[IntArray]
    response: Any = None  # a DeploymentResponse once sent
    failure: Exception | None = None

    def send(self) -> None:
        """Start an attempt; a failure to start is one more failure of the attempt, told by `wait`."""
        self.response = self.failure = None
        try:
            self.response = self.scorer.handle(self.deployment).answer.remote(*flatten(self.sequences))
        except (RayError, RayServeException, ScoringError) as error:
            self.failure = error

    def wait(self) -> FloatArray:
        """The answer. Every attempt has `timeout_seconds` from the moment that its caller waits for it."""
        config = self.scorer.config
        reason = ""
        for attempt in range(config.retries + 1):
            if attempt:
                pause = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2 ** (attempt - 1))
                time.sleep(pause * random.uniform(0.5, 1.5))  # callers that failed together do not come back together
                self.send()
            try:
                return self._attempt(config.timeout_seconds)
            except ScoringError as error:  # refused: the same request would be refused again
                raise ScoringError(f"{self.scorer.describe(self.deployment)}: {getattr(error, 'cause', error)}") from None
            except TimeoutError:
                reason = f"no answer within {config.timeout_seconds:g} s; raise scoring.timeout_seconds or scoring.{self.deployment}.count"
            except (RayError, RayServeException) as error:
                reason = f"{type(error).__name__}: {last_line(error)}"
        attempts = config.retries + 1
        raise ScoringError(f"{self.scorer.describe(self.deployment)} failed {attempts} times, last: {reason}")

    def _attempt(self, timeout_seconds: float) -> FloatArray:
        if self.response is None:
            assert self.failure is not None, "send() comes before wait()"
            raise self.failure
        try:
            answer: FloatArray = self.response.result(timeout_s=timeout_seconds)
            return answer
        except TimeoutError:
            self.response.cancel()
            raise


class _PendingAnswers(Generic[T]):
    """A call in flight: `finish` puts its requests' answers together."""

    def __init__(self, requests: Sequence[_Request], finish: Callable[[Sequence[FloatArray]], T]) -> None:
        self._requests = requests
        self._finish = finish

    def result(self) -> T:
        return self._finish([request.wait() for request in self._requests])
