"""What becomes of a remote call that fails."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from app.errors import DataError, RolloutError
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
