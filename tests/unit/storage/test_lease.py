"""One run at a time behind a URL."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from app.errors import CheckpointError
from app.process_record import me, runs_here
from app.storage import lease as module
from app.storage.lease import NAME, Lease
from app.storage.place import Place, open_place


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("RENEW", 0.02), ("EXPIRY", 0.15), ("SETTLE", 0.0), ("LOOK", 0.01)):
        monkeypatch.setattr(module, f"{name}_SECONDS", seconds)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return open_place(f"file://{tmp_path}/run")


def acquire(place: Place, lost: Any = lambda holder: None, wait: Any = lambda text: None) -> Lease:
    return Lease.acquire(place, lost, wait)


def write(place: Place, **record: Any) -> None:
    place.write(NAME, json.dumps({"token": "theirs", "count": 0, **me(), **record}).encode())


def test_a_held_lease_refuses_a_second_run_by_name(place: Place) -> None:
    held, said = acquire(place), []
    with pytest.raises(CheckpointError, match=rf"file://.*/run is in use by process {me()['pid']} on .*: wait"):
        acquire(place, wait=said.append)
    assert "waiting" in said[0]
    held.release()
    assert place.files() == {}
    acquire(place).release()


def test_a_lease_of_another_host_that_is_not_renewed_is_taken_over(place: Place) -> None:
    write(place, host="elsewhere")
    began = time.monotonic()
    acquire(place).release()
    assert time.monotonic() - began >= module.EXPIRY_SECONDS


def test_a_dead_process_of_this_host_is_not_waited_for(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EXPIRY_SECONDS", 60.0)
    write(place, process_started=1.0)
    acquire(place).release()


def test_a_lease_cut_short_is_nobodys(place: Place) -> None:
    place.write(NAME, b'{"tok')
    acquire(place).release()


def test_the_holder_hears_that_it_was_replaced_and_leaves_the_new_lease_alone(place: Place) -> None:
    heard, event = [], threading.Event()

    def lost(holder: str) -> None:
        heard.append(holder)
        event.set()

    held = acquire(place, lost)
    write(place, host="elsewhere", pid=7)
    assert event.wait(5)
    held.release()
    assert heard == ["process 7 on elsewhere"]
    assert json.loads(place.read(NAME) or b"")["token"] == "theirs"


def test_a_lease_that_is_gone_was_taken_over_and_given_back(place: Place) -> None:
    """The run of another machine has ended meanwhile: to send what this one has would undo that."""
    heard, event = [], threading.Event()

    def lost(holder: str) -> None:
        heard.append(holder)
        event.set()

    held = acquire(place, lost)
    place.delete(NAME)
    assert event.wait(5)
    assert not held.is_held()
    held.release()
    assert heard == ["another process, which has ended since,"]
    assert place.files() == {}


def test_of_two_that_write_at_once_one_gives_up(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.time, "sleep", lambda seconds: write(place, host="elsewhere", pid=7))
    with pytest.raises(CheckpointError, match="in use by process 7 on elsewhere"):
        acquire(place)


def test_a_process_is_known_by_more_than_its_number() -> None:
    assert runs_here(me()) is True
    assert runs_here(me() | {"process_started": 1.0}) is False
    for elsewhere in ("host", "machine", "pid_namespace"):  # machines of one name, and containers with their machine's name
        assert runs_here(me() | {elsewhere: "another"}) is None
    assert runs_here({key: value for key, value in me().items() if key in ("host", "pid", "process_started")}) is True
    assert runs_here({}) is None


def test_a_run_in_another_container_of_this_host_is_not_taken_for_dead(place: Place) -> None:
    """`docker run --network=host` gives a container its machine's name, and process numbers of its own."""
    write(place, pid_namespace="pid:[1]", process_started=1.0)
    began = time.monotonic()
    acquire(place).release()
    assert time.monotonic() - began >= module.EXPIRY_SECONDS
