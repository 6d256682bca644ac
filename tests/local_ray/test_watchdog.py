"""A wait that passes its deadline leaves the stacks of every process behind, also of one that hangs in C; nobody is hurt by that."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest
import ray

from app.errors import CorralError, DeadlineError
from app.workers.pending import collect
from app.workers.stacks import write_stacks_on_signal
from app.workers.watchdog import watching
from tests.waiting import wait_until


def test_a_hung_process_is_shown_where_it_hangs(tmp_path: Path) -> None:

    class Worker:
        def __init__(self, role: str) -> None:
            write_stacks_on_signal(role)
            write_stacks_on_signal("again")

        def work(self) -> str:
            return "done"

        def hang_in_c(self, begun: Path, enough: Path) -> str:
            begun.touch()
            while not enough.exists():  # the process that collects stacks may take long to start; and a signal ends C's sleep
                ctypes.PyDLL(None).sleep(1)  # holds the interpreter's lock: no thread of Python runs meanwhile
            return "woken"

    notes: list[str] = []
    actor = ray.remote(num_cpus=0)(Worker)
    hung, idle = actor.remote("learner rank 0"), actor.remote("rollout engine")
    gone = actor.remote("the past")
    try:
        ray.get([worker.work.remote() for worker in (hung, idle, gone)])
        ray.kill(gone)
        calls = [hung.hang_in_c.remote(tmp_path / "begun", tmp_path / "enough"), idle.work.remote()]
        wait_until((tmp_path / "begun").exists, "a call")  # a busy machine may take longer than the deadline to begin one
        with (
            watching(tmp_path / "logs", note=notes.append, early_share=0.5),
            pytest.raises(
                DeadlineError, match=r"^update: 1 of 2 workers did not answer within 1 s .*; what every process did is in /"
            ) as caught,
        ):
            collect(calls, phase="update", deadline_seconds=1, failure=CorralError)
        (tmp_path / "enough").touch()
        text = Path(str(caught.value).rpartition(" is in ")[2]).read_text()
        mine, *others = re.split(r"==== (.+), process \d+ on .*", text)
        stacks = dict(zip(others[::2], others[1::2], strict=True))  # in the order of their process numbers, which may start anew
        assert stacks.keys() == {"learner rank 0", "rollout engine"}
        assert "test_a_hung_process_is_shown_where_it_hangs" in mine
        assert "in hang_in_c" in stacks["learner rank 0"]
        assert "Thread" in stacks["rollout engine"] and "hang_in_c" not in stacks["rollout engine"]
        (note,) = notes
        early = Path(note.rpartition(" is in ")[2])
        assert note.startswith("update lasts more than 0.5 s; ") and "in hang_in_c" in early.read_text()
        assert ray.get(calls) == ["woken", "done"], "the signal ends nothing"
    finally:
        for worker in (hung, idle):
            ray.kill(worker)
