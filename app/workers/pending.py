"""Remote work in flight, with a deadline on every wait."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray

from app.errors import CorralError
from app.workers.watchdog import late, patiently

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
    `failure` when a process raised something, and `died` (default: `failure`) when a process ended or its node with the results;
    errors of ours raised inside a worker arrive as themselves.
    """
    try:
        results: list[Any] = patiently(lambda seconds: ray.get(list(references), timeout=seconds), phase=phase, seconds=deadline_seconds)
        return results
    except ray.exceptions.GetTimeoutError:
        _, missing = ray.wait(list(references), num_returns=len(references), timeout=0)
        raise late(
            phase,
            f"{len(missing)} of {len(references)} workers did not answer within {deadline_seconds:g} s "
            "(raise run.deadline_seconds if the work is simply that long)",
        ) from None
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, CorralError):
            raise error.cause from None
        raise failure(
            f"{phase}: {type(error.cause).__name__}: {last_line(error.cause)}; the whole trace is in the run's {TRACE}"
        ) from error
    except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError) as error:
        raise (died or failure)(
            f"{phase}: a worker process died ({str(error).splitlines()[0]}); rerun the same command to go on"
        ) from error


def last_line(message: BaseException | str) -> str:
    """The last line that says something: Ray's messages end with the innermost error."""
    lines = [line.strip() for line in str(message).splitlines() if line.strip()]
    return lines[-1] if lines else "no message"
