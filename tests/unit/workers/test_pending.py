"""What becomes of a remote call that fails."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from app.errors import CorralError, DataError, EngineDiedError, RolloutError
from app.workers.pending import collect


@pytest.mark.parametrize(
    ("cause", "expected", "message"),
    [
        (DataError("rows are missing"), DataError, "^rows are missing$"),
        (
            ValueError("a trace\nprompt too long"),
            RolloutError,
            r"^sampling: ValueError: prompt too long; the whole trace is in .*error\.txt$",
        ),
        (KeyError(), RolloutError, "^sampling: KeyError: no message"),
    ],
)
def test_a_failure_in_a_worker(cause: Exception, expected: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def get(*_: Any, **__: Any) -> None:
        raise ray.exceptions.RayTaskError("generate", "traceback", cause)

    monkeypatch.setattr(ray, "get", get)
    with pytest.raises(expected, match=message):
        collect([], phase="sampling", deadline_seconds=1, failure=RolloutError)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ray.exceptions.ActorDiedError(), "The actor died unexpectedly"),
        (ray.exceptions.ObjectLostError("ff", None, ""), "Failed to retrieve object ff"),
        (ray.exceptions.OutOfMemoryError("killed by the memory monitor\nmore"), "killed by the memory monitor"),
        (ray.exceptions.NodeDiedError("the node is gone"), "the node is gone"),
        (ray.exceptions.WorkerCrashedError(), "The worker died unexpectedly"),
        (ray.exceptions.LocalRayletDiedError(), "The task's local raylet died"),
        (ray.exceptions.OutOfMemoryError(""), "OutOfMemoryError"),
    ],
)
def test_a_process_that_is_lost_however_it_ended(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def get(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(ray, "get", get)
    with pytest.raises(EngineDiedError, match=rf"^sampling: a worker process died \({message}[^\n]*\); rerun the same command"):
        collect([], phase="sampling", deadline_seconds=1, failure=RolloutError, died=EngineDiedError)
    with pytest.raises(RolloutError, match=r"^sampling: a worker process died"):
        collect([], phase="sampling", deadline_seconds=1, failure=RolloutError)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ray.exceptions.ObjectStoreFullError("store full"), r"store full The local object store is full .*`ray memory`"),
        (ray.exceptions.OutOfDiskError("disk full"), r"disk full The object cannot be created .*`df`"),
        (ray.exceptions.ActorUnschedulableError("its node is dead"), "The actor is not schedulable: its node is dead;"),
        (ray.exceptions.RuntimeEnvSetupError("no such package"), r"Failed to set up runtime environment\. no such package;"),
        (ray.exceptions.ActorPlacementGroupRemoved(), r"The placement group .* has been removed\.;"),
        (ray.exceptions.RaySystemError("a bug"), "System error: a bug;"),
    ],
)
def test_what_else_ray_fails_with_is_no_lost_process_and_says_where_its_trace_is(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def get(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(ray, "get", get)
    with pytest.raises(CorralError, match=rf"^sampling: {type(error).__name__}: {message}.*the run's logs/error\.txt$") as raised:
        collect([], phase="sampling", deadline_seconds=1, failure=RolloutError, died=EngineDiedError)
    assert type(raised.value) is RolloutError and "\n" not in str(raised.value)
    assert raised.value.__cause__ is error
