"""What a stage of a pipeline may go on from: its own checkpoints, while it comes from the same data and models as they."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from app.checkpoint import CheckpointStore
from app.config.loading import with_values
from app.config.recipe import Recipe
from app.errors import CheckpointError, Interrupted
from app.run_folder import RunFolder
from app.run_layout import CHECKPOINTS, MODEL
from app.stages.pipeline import Pipeline


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.open(with_values(Recipe(), {"run.dir": str(tmp_path)}), "pipeline")


def once(run: RunFolder, stage: str, train: Callable[[], Mapping[str, Any]], **parents: str) -> str:
    """The stage in a process that has come as far as to its parents; its content hash."""
    pipeline = object.__new__(Pipeline)
    pipeline.run, pipeline.parents = run, {"data": "d", **parents}
    pipeline.tracker = SimpleNamespace(note=lambda text: None)  # type: ignore[assignment]
    pipeline._once(stage, train)
    return pipeline.parents[stage]


class Training:
    """Writes a model, and before that a checkpoint that is gone on from. stops: how many times it is stopped in between."""

    def __init__(self, run: RunFolder, stage: str, weights: str = "weights", stops: int = 0) -> None:
        self.folder, self.weights, self.stops = run.path / stage, weights, stops
        self.went_on: list[bool] = []

    def __call__(self) -> dict[str, Any]:
        store = CheckpointStore(self.folder / CHECKPOINTS)
        self.went_on.append(store.latest() is not None)
        store.save(len(self.went_on), {}, lambda folder: None)
        if len(self.went_on) <= self.stops:
            raise Interrupted("stopped")
        (self.folder / MODEL).mkdir(exist_ok=True)
        (self.folder / MODEL / "weights").write_text(self.weights)
        return {"steps": 1}


def test_a_stage_goes_on_while_its_parents_are_the_same(run: RunFolder) -> None:
    train = Training(run, "rm", stops=2)
    for _ in range(2):
        with pytest.raises(Interrupted):
            once(run, "rm", train, sft="a")
    once(run, "rm", train, sft="a")
    assert train.went_on == [False, True, True]


def test_a_stage_does_not_go_on_from_checkpoints_that_began_with_another_model(run: RunFolder) -> None:
    train = Training(run, "ppo", stops=1)
    with pytest.raises(Interrupted):
        once(run, "ppo", train, sft="a", rm="b")
    refused = rf"^{run.path}/ppo: its checkpoints began with another rm: restore that, or remove {run.path}/ppo to begin ppo anew$"
    for _ in range(2):
        with pytest.raises(CheckpointError, match=refused):
            once(run, "ppo", train, sft="a", rm="trained again")
    assert train.went_on == [False]


def test_a_finished_stage_whose_parent_was_trained_again_is_not_made_from_what_is_left_of_it(run: RunFolder) -> None:
    first = once(run, "sft", Training(run, "sft"))
    train = Training(run, "rm")
    once(run, "rm", train, sft=first)
    (run.path / "sft" / MODEL / "weights").write_text("damaged")
    second = once(run, "sft", Training(run, "sft", "other weights"))
    with pytest.raises(CheckpointError, match="its checkpoints began with another sft"):
        once(run, "rm", train, sft=second)
    assert train.went_on == [False]


def test_without_a_checkpoint_a_stage_begins_with_what_there_is(run: RunFolder) -> None:
    def stopped_early() -> Mapping[str, Any]:
        raise Interrupted("before the first step")

    with pytest.raises(Interrupted):
        once(run, "rm", stopped_early, sft="a")
    train = Training(run, "rm", stops=1)
    with pytest.raises(Interrupted):
        once(run, "rm", train, sft="b")
    once(run, "rm", train, sft="b")
    assert train.went_on == [False, True]


def test_a_stage_that_another_command_made_from_something_else_is_not_taken(run: RunFolder) -> None:
    """`corral rm` trains on `model.path` itself, `corral pipeline` with the same recipe on what SFT made of it."""
    once(run, "rm", Training(run, "rm"))
    train = Training(run, "rm")
    with pytest.raises(CheckpointError, match="its checkpoints began with another sft"):
        once(run, "rm", train, sft="a")
    assert train.went_on == []
