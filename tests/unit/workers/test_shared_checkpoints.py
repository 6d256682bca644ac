"""Which checkpoint a training goes on from, when it refuses to, and what is committed when. One rank, files in place of shards."""

from __future__ import annotations

import errno
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from app.durable import read_json
from app.errors import CheckpointError, DiskError
from app.workers.shared_checkpoints import SharedCheckpoints


@pytest.fixture
def checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SharedCheckpoints:
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 1)
    monkeypatch.setattr("torch.distributed.broadcast_object_list", lambda box, device: None)
    monkeypatch.setattr("torch.distributed.barrier", lambda: None)
    monkeypatch.setattr("app.workers.shared_checkpoints.save_engine", lambda engine, folder, state: (folder / "shard").write_text(engine))
    return SharedCheckpoints(tmp_path / "checkpoints", keep=3, device=torch.device("cpu"), deadline_seconds=60)


def steps_in(checkpoints: SharedCheckpoints) -> list[str]:
    return sorted(path.name for path in checkpoints.store.folder.glob("step-*"))


def save(checkpoints: SharedCheckpoints, step: int, workers: int = 1) -> Path:
    return checkpoints.store.save(step, {"workers": workers}, lambda folder: (folder / "shard").write_bytes(bytes(100)) and None)


def test_the_newest_complete_checkpoint_is_gone_on_from(checkpoints: SharedCheckpoints) -> None:
    assert checkpoints.newest() is None
    first = save(checkpoints, 1)
    (save(checkpoints, 2) / "shard").write_bytes(bytes(99))
    (save(checkpoints, 3) / "shard").unlink()
    assert checkpoints.newest() == first


def test_nothing_starts_over_beside_damaged_checkpoints(checkpoints: SharedCheckpoints) -> None:
    (save(checkpoints, 1) / "shard").unlink()
    with pytest.raises(CheckpointError, match=r"checkpoints: step-00000001 and all older .* are damaged: restore one of them, or delete"):
        checkpoints.newest()


def test_a_checkpoint_of_another_number_of_workers_is_refused(checkpoints: SharedCheckpoints) -> None:
    save(checkpoints, 1, workers=4)
    with pytest.raises(CheckpointError, match=r"was saved by 4 workers, and there are 1: set workers\.count = 4, or delete"):
        checkpoints.newest()


def test_training_goes_on_while_a_checkpoint_is_committed(checkpoints: SharedCheckpoints, disk: threading.Event) -> None:
    engine: Any = "weights of step 1"
    with checkpoints:
        checkpoints.save(1, engine, {})
        checkpoints.settle(wait_for_it=False)
        assert steps_in(checkpoints) == [], "and the call has returned"
        threading.Timer(0.05, disk.set).start()
    assert steps_in(checkpoints) == ["step-00000001"], "nothing is under way after the block"
    newest = checkpoints.newest()
    assert newest is not None and (newest / "shard").read_text() == engine


def test_the_next_checkpoint_is_written_when_the_one_before_is_committed(
    checkpoints: SharedCheckpoints, disk: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No rank is told its folder before."""
    seen: list[list[str]] = []
    engine: Any = "weights"
    with checkpoints:
        checkpoints.save(1, engine, {})
        monkeypatch.setattr("torch.distributed.broadcast_object_list", lambda box, device: seen.append(steps_in(checkpoints)))
        threading.Timer(0.05, disk.set).start()
        checkpoints.save(2, engine, {})
    assert seen == [["step-00000001"]]
    assert steps_in(checkpoints) == ["step-00000001", "step-00000002"]


def test_nothing_is_committed_before_every_rank_has_written_its_shards(
    checkpoints: SharedCheckpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_rank_writes() -> None:
        (folder,) = checkpoints.store.folder.iterdir()
        (folder / "shard of rank 1").write_text("late")

    monkeypatch.setattr("torch.distributed.barrier", other_rank_writes)
    engine: Any = "weights"
    with checkpoints:
        checkpoints.save(1, engine, {})
    newest = checkpoints.newest()
    assert newest is not None
    assert sorted(read_json(newest / "manifest.json")["files"]) == ["shard", "shard of rank 1"]


def test_a_commit_that_fails_ends_the_training_before_the_next_checkpoint(
    checkpoints: SharedCheckpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    engine: Any = "weights"
    first = save(checkpoints, 1)
    monkeypatch.setattr("app.checkpoint.sync_tree", full)
    checkpoints.save(2, engine, {})
    with pytest.raises(DiskError, match=r"the checkpoint of step 2 cannot be written \(No space left on device\)"):
        checkpoints.save(3, engine, {})
    with pytest.raises(DiskError, match="the checkpoint of step 4"), checkpoints:
        checkpoints.save(4, engine, {})
    assert checkpoints.newest() == first
    assert list(checkpoints.store.folder.iterdir()) == [first]


def test_another_rank_writes_where_rank_zero_says_and_commits_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = tmp_path / "checkpoints" / ".saving-step-00000001"
    where.mkdir(parents=True)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.broadcast_object_list", lambda box, device: box.__setitem__(0, where))
    monkeypatch.setattr("torch.distributed.barrier", lambda: None)
    monkeypatch.setattr("app.workers.shared_checkpoints.save_engine", lambda engine, folder, state: (folder / "shard").write_text(engine))
    engine: Any = "share of rank 1"
    with SharedCheckpoints(tmp_path / "checkpoints", keep=1, device=torch.device("cpu"), deadline_seconds=60) as checkpoints:
        checkpoints.save(1, engine, {})
        checkpoints.settle(wait_for_it=False)
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()] == [
        "checkpoints/.saving-step-00000001/shard"
    ]
