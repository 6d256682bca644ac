"""What a training worker does around the training: refusals, blame for a loss, patience, the best model. One rank, no engine."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from app.data.token_cache import TRAIN_FILE
from app.durable import write_json
from app.errors import CheckpointError, ConfigError, CorralError, DiskError, NonFiniteError
from app.run_layout import HELD_OUT_METRICS
from app.workers import training_loop
from app.workers.training_loop import Progress, TrainingLoop, Window

SILENCE = SimpleNamespace(log=lambda *event: None)


class Checkpoints:
    """Commits are under way until somebody waits for them. fails: steps whose checkpoint cannot be committed."""

    def __init__(self, fails: Collection[int] = ()) -> None:
        self.kept: list[Progress] = []
        self.under_way: list[int] = []
        self.fails = fails

    def save(self, step: int, engine: object, state: Mapping[str, Any]) -> None:
        self.settle(wait_for_it=True)
        self.kept.append(Progress(**state["progress"]))
        self.under_way = [step]

    def settle(self, *, wait_for_it: bool) -> None:
        for step in self.under_way:
            if step in self.fails:
                raise DiskError(f"the checkpoint of step {step} cannot be written")
        self.under_way = [] if wait_for_it else self.under_way

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.settle(wait_for_it=True)


@pytest.fixture
def loop() -> TrainingLoop:
    """The only rank, before anything is built."""
    loop = object.__new__(TrainingLoop)
    loop.rank, loop.world_size = 0, 1
    loop.task = SimpleNamespace(stage="rm")  # type: ignore[assignment]
    loop.checkpoints = Checkpoints()  # type: ignore[assignment]
    return loop


@pytest.mark.parametrize("error", [CheckpointError("damaged"), ConfigError("no fp16 here"), NonFiniteError("loss is nan")])
def test_what_every_rank_raises_is_an_outcome_and_no_reason_to_restart(error: CorralError, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(job: object) -> None:
        raise error

    monkeypatch.setattr(training_loop, "TrainingLoop", refuse)
    job = SimpleNamespace(events=SimpleNamespace(flush=lambda: None))
    assert training_loop.train_worker(job).error is error  # type: ignore[arg-type]


def test_a_loss_that_is_not_finite_names_the_rows_of_every_rank(loop: TrainingLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(found: list[list[int]], mine: list[int]) -> None:
        found[:] = [mine, [4, 2]]

    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    parts = [torch.tensor(value) for value in (1.0, float("nan"), float("inf"))]
    assert loop.blame([[0, 1], [9, 3], [5, 6]], parts) == f", among rows 2, 3, 4, 9 (from 0) of {TRAIN_FILE}"


def test_a_run_out_of_patience_does_not_train_on_after_a_restart(loop: TrainingLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checkpoint may be of the very step at which it stopped."""
    metrics = {"loss": 1.0}
    loop.progress = Progress(step=4, before=metrics, evaluated=metrics, evaluated_step=4, best_loss=0.5, stale=2)
    loop.config = SimpleNamespace(patience=2, keep_best=False)  # type: ignore[assignment]
    loop.job = SimpleNamespace(steps=10, model_folder=Path("model"), events=SILENCE)  # type: ignore[assignment]
    exported: list[Path] = []
    monkeypatch.setattr(loop, "export", exported.append)
    result = loop.run().result
    assert result is not None
    assert (result.steps, result.after, exported) == (4, metrics, [Path("model")])


def test_the_best_model_is_taken_once_and_found_again_after_a_stop_before_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loop: TrainingLoop
) -> None:
    monkeypatch.setattr("torch.distributed.barrier", lambda: None)
    loop.job = SimpleNamespace(model_folder=tmp_path / "model")  # type: ignore[assignment]
    for folder, loss in ((tmp_path / "model", 2.0), (loop.best_folder, 1.0)):
        folder.mkdir()
        write_json(folder / HELD_OUT_METRICS, {"step": 6, "metrics": {"loss": loss}})
    assert loop.take_best() == {"loss": 1.0}
    assert not loop.best_folder.exists()
    assert loop.take_best() == {"loss": 1.0}, "the same command again, and no later evaluation was better"


def in_ten_steps(loop: TrainingLoop, monkeypatch: pytest.MonkeyPatch, checkpoints: Checkpoints, stops: set[int] = frozenset()) -> list[int]:
    """Prepare a training of ten steps, of which a checkpoint is due at the fifth, and stops are asked for in some. The steps at which it
    is evaluated, as they come."""
    judged: list[int] = []

    def train_step() -> bool:
        loop.progress.step += 1
        return loop.progress.step in stops

    def judge() -> None:
        loop.progress.evaluated_step = loop.progress.step
        judged.append(loop.progress.step)

    loop.config = SimpleNamespace(patience=None, keep_best=False, eval_every=4, log_every=100, save_every=5)  # type: ignore[assignment]
    loop.job = SimpleNamespace(steps=10, model_folder=Path("model"), events=SILENCE)  # type: ignore[assignment]
    loop.window = Window()
    loop.checkpoints = checkpoints  # type: ignore[assignment]
    loop.engine = None
    loop.progress = Progress(before={"loss": 1.0}, evaluated_step=0)
    for name, replacement in (("train_step", train_step), ("judge", judge), ("log", lambda: None), ("export", lambda folder: None)):
        monkeypatch.setattr(loop, name, replacement)
    return judged


def test_a_stop_leaves_no_evaluation_out(loop: TrainingLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    """It decides on patience and on the best model: a stopped training must come to the model of one that was not."""
    undisturbed = in_ten_steps(loop, monkeypatch, Checkpoints())
    assert loop.run().result is not None
    assert undisturbed == [4, 8, 10]
    checkpoints = Checkpoints()
    stopped = in_ten_steps(loop, monkeypatch, checkpoints, stops={3, 4, 8, 9})
    while loop.run().result is None:
        loop.progress = checkpoints.kept[-1]
    assert stopped == undisturbed


@pytest.mark.parametrize(("stops", "steps", "saved"), [(set(), 10, 5), ({7}, 7, 7)])
def test_the_workers_end_when_their_last_checkpoint_is_committed(
    loop: TrainingLoop, monkeypatch: pytest.MonkeyPatch, stops: set[int], steps: int, saved: int
) -> None:
    checkpoints = Checkpoints()
    in_ten_steps(loop, monkeypatch, checkpoints, stops)
    assert loop.run().steps == steps
    assert checkpoints.kept[-1].step == saved
    assert not checkpoints.under_way


@pytest.mark.parametrize(("fails", "stops", "ends"), [(5, set(), 6), (7, {7}, 7)])
def test_a_checkpoint_that_cannot_be_committed_ends_the_training_after_the_next_step_or_with_the_stop(
    loop: TrainingLoop, monkeypatch: pytest.MonkeyPatch, fails: int, stops: set[int], ends: int
) -> None:
    in_ten_steps(loop, monkeypatch, Checkpoints({fails}), stops)
    with pytest.raises(DiskError, match=f"of step {fails}"):
        loop.run()
    assert loop.progress.step == ends


def test_the_driver_hears_that_a_resumed_training_is_at_work(loop: TrainingLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[tuple[str, int, dict[str, float]]] = []
    loop.job = SimpleNamespace(steps=10, events=SimpleNamespace(log=lambda *event: heard.append(event)))  # type: ignore[assignment]
    loop.config = SimpleNamespace(patience=None, eval_every=100)  # type: ignore[assignment]
    loop.progress = Progress(step=4, before={"loss": 1.0}, evaluated_step=0)

    def train_step() -> bool:
        assert heard == [("rm", 4, {})]
        raise NonFiniteError("far enough")

    monkeypatch.setattr(loop, "train_step", train_step)
    with pytest.raises(NonFiniteError):
        loop.run()
