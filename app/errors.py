"""One picklable hierarchy of errors. Every message names the thing, the reason and the remedy."""

from __future__ import annotations


class CorralError(Exception):
    """Base of every error that Corral raises on purpose; the command line prints it in one line, without a traceback.

    `exit_code` is what the command line returns: 2 for input that the user can mend, 1 for a run that failed.
    """

    exit_code = 1


class ConfigError(CorralError, ValueError):
    """A recipe, an option or an environment that cannot work as given."""

    exit_code = 2


class DataError(CorralError, ValueError):
    """Data that is missing, malformed or unusable for the stage that asked for it."""

    exit_code = 2


class ModelError(CorralError, ValueError):
    """A model folder or tokenizer that is missing a part that the stage needs."""

    exit_code = 2


class PlacementError(CorralError, RuntimeError):
    """A recipe needs more GPUs, CPUs or memory than the cluster has."""

    exit_code = 2


class RolloutError(CorralError, RuntimeError):
    """A rollout engine failed, or gave something that cannot be trained on."""


class EngineDiedError(RolloutError):
    """The process of a rollout engine ended; the pool starts another one."""


class StaleRolloutError(RolloutError):
    """A rollout was sampled by a policy older than `ppo.max_lag` allows."""


class LearnerError(CorralError, RuntimeError):
    """The learner does not compute twice the same from the same weights and tokens."""


class WeightPushError(RolloutError):
    """A weight push brought the rollout engine other weights than the learner's, or it does not compute what the learner computes."""


class ScoringError(CorralError, RuntimeError):
    """The scoring service did not answer a request; never turned into a score of 0."""


class BadRequestError(ScoringError):
    """A request that no model could answer: wrong shape, type or token ids. The same request would be refused again."""


class TooLongError(BadRequestError):
    """A sequence is longer than the model's context, or the answer larger than the service sends."""


class UnauthorizedError(ScoringError):
    """The request does not carry the service's bearer token."""


class ModelNotFoundError(ScoringError):
    """The service holds no model of that name and version."""


class NotReadyError(ScoringError):
    """The model is known but cannot answer yet (or any more): it is loading, draining or being replaced."""


class OverloadedError(ScoringError):
    """More requests wait than the service holds; ask again after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message, retry_after)  # both travel when it is pickled
        self.retry_after = retry_after

    def __str__(self) -> str:
        return str(self.args[0])


class ScoringTimeoutError(ScoringError, TimeoutError):
    """No answer within the request's deadline."""


class NonFiniteError(CorralError, RuntimeError):
    """A loss, reward or gradient is NaN or infinite; raised before it is in the weights, and else says so."""


class AlarmError(CorralError, RuntimeError):
    """A metric went beyond its limit, and its alarm is set to stop the run."""

    def __init__(self, metric: str, value: float, limit: float, remedy: str) -> None:
        super().__init__(metric, value, limit, remedy)  # all travel when it is pickled
        self.metric, self.value, self.limit, self.remedy = metric, value, limit, remedy

    def __str__(self) -> str:
        return f"alarm: {self.metric} = {self.value:.4g}, limit alarms.{self.metric}.limit = {self.limit:g}: {self.remedy}"


class ReplayError(CorralError, RuntimeError):
    """A recorded step, computed again, differs from what the run has logged."""


class CheckpointError(CorralError, RuntimeError):
    """A checkpoint or run folder that is incomplete, or belongs to another configuration."""

    exit_code = 2


class DiskError(CorralError, RuntimeError):
    """A checkpoint or another file of a run cannot be written: the disk is full, read-only or gone."""


class StorageError(CorralError, RuntimeError):
    """What a run left in its folder could not be brought to `run.storage`."""


class DeadlineError(CorralError, TimeoutError):
    """A wait passed its deadline: names the phase and what it waited for."""


class Interrupted(CorralError):
    """SIGINT or SIGTERM arrived and the stage stopped at a safe point; the same command goes on from there."""

    exit_code = 130


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none: to stand in a message of ours."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
