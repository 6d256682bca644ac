"""Remote work in flight, with a deadline on every wait."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import (
    GetTimeoutError,
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from app.errors import CorralError, first_line
from app.workers.watchdog import late, patiently

LOSSES = (RayActorError, WorkerCrashedError, OutOfMemoryError, NodeDiedError, LocalRayletDiedError, ObjectLostError)
"""How Ray tells that a process is gone, by itself, by the hand of its memory monitor, or with its node."""

TRACE = "logs/error.txt"
"""Where a command leaves the trace of a failure, in its run folder."""


def collect(
    references: Sequence[ray.ObjectRef[Any]],
    *,
    phase: str,
    deadline_seconds: float,
    failure: type[CorralError],
    died: type[CorralError] | None = None,
) -> list[Any]:
    """Results of remote calls, in order.

    Raises DeadlineError naming the phase (and where stacks are, see app/workers/watchdog.py) when they are not all there in time,
    `died` (default: `failure`) when a process ended or its node with the results, and `failure` when a process raised something or
    Ray could not do its part; errors of ours raised inside a worker arrive as themselves.
    """
    try:
        results: list[Any] = patiently(lambda seconds: ray.get(list(references), timeout=seconds), phase=phase, seconds=deadline_seconds)
        return results
    except GetTimeoutError:
        _, missing = ray.wait(list(references), num_returns=len(references), timeout=0)
        raise late(
            phase,
            f"{len(missing)} of {len(references)} workers did not answer within {deadline_seconds:g} s "
            "(raise run.deadline_seconds if the work is simply that long)",
        ) from None
    except RayTaskError as error:
        if isinstance(error.cause, CorralError):
            raise error.cause from None
        raise failure(_told(phase, error.cause, last_line(error.cause))) from error
    except LOSSES as error:
        raise (died or failure)(f"{phase}: a worker process died ({first_line(error)}); rerun the same command to go on") from error
    except RayError as error:  # the first line says what, the last one why, or what to do
        raise failure(_told(phase, error, " ".join(dict.fromkeys((first_line(error), last_line(error)))))) from error


def _told(phase: str, error: BaseException, reason: str) -> str:
    return f"{phase}: {type(error).__name__}: {reason}; the whole trace is in the run's {TRACE}"


def last_line(message: BaseException | str) -> str:
    """The last line that says something: Ray's messages end with the innermost error."""
    lines = [line.strip() for line in str(message).splitlines() if line.strip()]
    return lines[-1] if lines else "no message"
