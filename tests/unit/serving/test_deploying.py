"""Which error a user sees when an application neither comes up nor goes away."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from app.errors import DeadlineError
from serve import deploying


@pytest.fixture
def stuck_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Serve that runs, holds nothing else, and never gets rid of what it is to delete."""

    def delete(name: str) -> None:
        raise TimeoutError(f"{name} was not deleted after 60 s")

    calls = {"status": lambda: SimpleNamespace(applications={}), "delete": delete, "shutdown": lambda: None}
    monkeypatch.setattr(deploying, "serve", SimpleNamespace(**calls))
    monkeypatch.setattr(deploying, "start_serve", lambda start: True)
    monkeypatch.setattr(deploying, "serve_is_running", lambda: True)


TARGETS: Any = [SimpleNamespace(name="scoring")]


def test_a_failed_start_is_told_though_what_it_leaves_is_not_deleted_in_time(stuck_serve: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def deploy(targets: Any, deadline_seconds: float) -> None:
        raise DeadlineError("waits on reference")

    monkeypatch.setattr(deploying, "deploy", deploy)
    with pytest.raises(DeadlineError, match="waits on reference"), deploying.deployed(TARGETS, deadline_seconds=1, stop_serve=True):
        pass


def test_what_is_to_be_deleted_is_gone_with_the_serve_that_another_job_stops(stuck_serve: None, monkeypatch: pytest.MonkeyPatch) -> None:
    running = [True]

    def delete(name: str) -> None:
        running[0] = False
        raise ActorDiedError

    monkeypatch.setattr(deploying.serve, "delete", delete)
    monkeypatch.setattr(deploying, "serve_is_running", lambda: running[0])
    monkeypatch.setattr(deploying, "deploy", lambda targets, deadline_seconds: None)
    with deploying.deployed(TARGETS, deadline_seconds=1, stop_serve=True):
        pass
    assert not running[0]
    monkeypatch.setattr(deploying, "serve_is_running", lambda: True)
    with pytest.raises(ActorDiedError), deploying.deployed(TARGETS, deadline_seconds=1, stop_serve=True):
        pass


def test_a_service_that_was_up_and_does_not_go_away_is_an_error(stuck_serve: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deploying, "deploy", lambda targets, deadline_seconds: None)
    with pytest.raises(TimeoutError, match="not deleted"), deploying.deployed(TARGETS, deadline_seconds=1, stop_serve=True):
        pass
