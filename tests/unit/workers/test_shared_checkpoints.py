"""Which checkpoint a training goes on from, and when it refuses to. One rank, files in place of shards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from app.errors import CheckpointError
from app.workers.shared_checkpoints import SharedCheckpoints


@pytest.fixture
def checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SharedCheckpoints:
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 1)
    monkeypatch.setattr("torch.distributed.broadcast_object_list", lambda box, device: None)
    return SharedCheckpoints(tmp_path / "checkpoints", keep=3, device=torch.device("cpu"))


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
