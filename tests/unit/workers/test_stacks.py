"""Stacks are asked for when processes are dying: one that goes meanwhile does not cost those of the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.workers import stacks
from app.workers.stacks import stacks_of_node


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two processes that write when they are asked to, and a third one."""
    for pid in (1, 2, 3):
        (tmp_path / f"{pid}@17@learner rank {pid}").touch()

    def ask(pid: int, number: int) -> None:
        if pid == 3:
            raise ProcessLookupError
        (tmp_path / f"{pid}@17@learner rank {pid}").write_text(f"Thread of {pid}\n")

    monkeypatch.setattr(stacks, "_started", lambda pid: "17")
    monkeypatch.setattr(stacks.os, "kill", ask)
    return tmp_path


def test_a_process_that_ends_before_it_can_be_asked(folder: Path) -> None:
    answer = stacks_of_node(folder)
    assert "Thread of 1" in answer and "Thread of 2" in answer and "rank 3" not in answer


def test_a_process_that_another_collector_has_found_ended(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def started(pid: int) -> str | None:
        if pid != 3:
            return "17"
        (folder / "3@17@learner rank 3").unlink()
        return None

    monkeypatch.setattr(stacks, "_started", started)
    answer = stacks_of_node(folder)
    assert "Thread of 1" in answer and "Thread of 2" in answer and "rank 3" not in answer


def test_a_process_that_ends_while_the_others_write(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = stacks.os.kill

    def asked(pid: int, number: int) -> None:
        if pid == 3:
            (folder / "3@17@learner rank 3").unlink()  # by another collector
        else:
            ask(pid, number)

    monkeypatch.setattr(stacks.os, "kill", asked)
    monkeypatch.setattr(stacks, "SETTLE_SECONDS", 0.1)
    answer = stacks_of_node(folder)
    assert "Thread of 1" in answer and "Thread of 2" in answer and "learner rank 3" in answer
