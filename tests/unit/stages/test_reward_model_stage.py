"""What a reward model that writes no answers is centred on."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from app.config.recipe import Recipe
from app.data.token_cache import TRAIN_FILE, GroupRow, write_groups
from app.run_folder import RunFolder
from app.stages.reward_model import training_replies


def test_replies_of_the_first_groups(tmp_path: Path) -> None:
    run = RunFolder.open(Recipe.model_validate({"run": {"dir": str(tmp_path / "run")}}), "rm")
    rows = [GroupRow(str(n), tuple(np.arange(n + k + 1, dtype=np.int32) for k in range(2))) for n in range(3)]
    write_groups(rows, run.stage("rm") / "data" / TRAIN_FILE)
    assert [len(sequence) for sequence in training_replies(run, 2)] == [1, 2, 2, 3]
