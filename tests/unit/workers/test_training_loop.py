"""What a training worker does with the best model, without the training."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from app.durable import write_json
from app.workers.training_loop import HELD_OUT, TrainingLoop


def test_the_best_model_is_taken_once_and_found_again_after_a_stop_before_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.distributed.barrier", lambda: None)
    loop = object.__new__(TrainingLoop)
    loop.rank, loop.job = 0, SimpleNamespace(model_folder=tmp_path / "model")  # type: ignore[assignment]
    for folder, loss in ((tmp_path / "model", 2.0), (loop.best_folder, 1.0)):
        folder.mkdir()
        write_json(folder / HELD_OUT, {"step": 6, "metrics": {"loss": loss}})
    assert loop.take_best() == {"loss": 1.0}
    assert not loop.best_folder.exists()
    assert loop.take_best() == {"loss": 1.0}, "the same command again, and no later evaluation was better"
