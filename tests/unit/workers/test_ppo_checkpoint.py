"""Which model a checkpoint's run began with."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.durable import write_json
from app.errors import CheckpointError
from app.workers.ppo_checkpoint import starting_policy


@pytest.mark.parametrize("stage", ["ppo", "tune/trial_a"])
@pytest.mark.parametrize("made", ["sft/model", "base/base", None])
def test_a_checkpoint_of_a_run_and_of_a_trial_of_a_search(stage: str, made: str | None, tmp_path: Path) -> None:
    run = tmp_path / "tune"  # which may be its name too
    checkpoint = run / stage / "checkpoints" / "step-00000004"
    checkpoint.mkdir(parents=True)
    write_json(run / "manifest.json", {"config": {"model": {"path": "given"}}})
    if made is not None:
        (run / made).mkdir(parents=True)
    assert starting_policy(checkpoint) == ("given" if made is None else str(run / made))


def test_a_checkpoint_that_was_moved_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="leave checkpoints where the run wrote them"):
        starting_policy(tmp_path / "ppo" / "checkpoints" / "step-00000004")
