"""Supervised training that is killed, against the same run left alone; and the DeepSpeed set-ups, against each other."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import ray
import torch
from torch.utils._pytree import tree_leaves

from app.durable import tree_hash
from app.errors import ConfigError
from app.workers.event_channel import EventChannel
from app.workers.supervised_task import WorkerOutcome
from tests.local_ray import supervised_runs as runs
from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]


class Undisturbed(NamedTuple):
    """Runs that nothing happens to, by stage or layout: what `fit` would return, what was logged, where the model is."""

    outcomes: dict[str, WorkerOutcome]
    points: dict[str, list[dict[str, float]]]
    folder: Path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("faults")
    runs.write_inputs(root)
    return root


@pytest.fixture(scope="module")
def undisturbed(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """All of them on one pair of workers, because starting processes is nearly all that such a run costs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    names = [*runs.CONFIGS, *runs.LAYOUTS]
    trackers = {name: runs.Points(folder / f"{name}.jsonl") for name in names}
    with ExitStack() as stack:
        events = {name: stack.enter_context(EventChannel(tracker)).sender for name, tracker in trackers.items()}
        jobs = [runs.undisturbed_job(stage, inputs, folder / stage, events[stage]) for stage in runs.CONFIGS]
        jobs += [runs.layout_job(layout, inputs, folder / layout, events[layout]) for layout in runs.LAYOUTS]
        outcomes = runs.in_one_group(jobs, folder)
    points = {name: tracker.read() for name, tracker in trackers.items()}
    return Undisturbed(dict(zip(names, outcomes, strict=True)), points, folder)


CHECKPOINTS = {
    "sft": {"step-00000003", "step-00000006", "step-00000050", "step-00000051", ".saving-step-00000052"},  # early stopping, before step 9
    "rm": {"step-00000006", "step-00000009"},
}
"""What is there in the end: with a new checkpoint the old ones go, and the damaged ones."""


def plant_damage(checkpoints: Path) -> None:
    """Copies of the last checkpoint under later steps: one with a shard cut short, one without a shard, one under its temporary name."""
    for name in ("step-00000050", "step-00000051", ".saving-step-00000052"):
        shutil.copytree(checkpoints / "step-00000006", checkpoints / name)
    cut = next((checkpoints / "step-00000050" / "engine").glob("zero_pp_rank_1_*optim_states.pt"))
    os.truncate(cut, cut.stat().st_size - 1)
    next((checkpoints / "step-00000051" / "engine").glob("zero_pp_rank_1_*optim_states.pt")).unlink()


def optimizer_state(checkpoint: Path) -> list[torch.Tensor]:
    """Moments, step counts and float32 weights in the shards of both ranks."""
    shards = sorted((checkpoint / "engine").glob("*optim_states.pt"))
    assert len(shards) == 2
    leaves = tree_leaves([torch.load(shard, weights_only=False)["optimizer_state_dict"] for shard in shards])
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def wait_until_gone(pid: int) -> None:
    wait_until(lambda: not psutil.pid_exists(pid), f"the end of worker {pid}, whose driver is gone")


@pytest.mark.parametrize("stage", list(runs.CONFIGS))
def test_a_worker_and_then_the_whole_job_killed_change_nothing(stage: str, inputs: Path, undisturbed: Undisturbed) -> None:
    """SIGKILL of rank 1 in the middle of a step: the run goes on by itself. SIGKILL of its driver, and with it of every process
    of the job, later: the same call goes on. Model folder (with its metrics), optimizer states and every logged point are the same
    to the last bit, and damaged checkpoints of later steps are passed over. SFT: LoRA with dropout, ZeRO 2, early stopping, the last
    weights; reward model: ZeRO 3, the best weights."""
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    command = [sys.executable, "-m", "tests.local_ray.supervised_runs", stage, str(inputs)]
    driver = subprocess.run(command, cwd=ROOT, env=environment, timeout=300, check=False)
    assert driver.returncode == -signal.SIGKILL
    assert (inputs / f"{stage}.worker-died").exists()
    wait_until_gone(int((inputs / f"{stage}.job-died").read_text()))
    plant_damage(inputs / stage / "checkpoints")
    before = runs.Points(inputs / f"{stage}.jsonl").read()

    result = runs.train(stage, inputs)
    expected = undisturbed.outcomes[stage].result
    assert expected is not None
    assert (result.before, result.after, result.steps, result.tokens) == (expected.before, expected.after, expected.steps, expected.tokens)
    assert tree_hash(inputs / stage / "model") == tree_hash(undisturbed.folder / stage / "model")
    last = max(CHECKPOINTS[stage] & {"step-00000006", "step-00000009"})
    for state, undisturbed_state in zip(
        optimizer_state(inputs / stage / "checkpoints" / last),
        optimizer_state(undisturbed.folder / stage / "checkpoints" / last),
        strict=True,
    ):
        assert torch.equal(state, undisturbed_state)
    points = runs.Points(inputs / f"{stage}.jsonl").read()
    assert points[len(before)]["step"] > 6, "the second run began at the checkpoint of step 6"
    assert [point["step"] for point in before].count(4) > [point["step"] for point in undisturbed.points[stage]].count(4)
    assert {tuple(point.items()) for point in points} == {tuple(point.items()) for point in undisturbed.points[stage]}
    assert {path.name for path in (inputs / stage / "checkpoints").iterdir() if path.is_dir()} == CHECKPOINTS[stage]


def losses(undisturbed: Undisturbed, layout: str) -> list[float]:
    """Losses, gradient norms and held-out losses of every step."""
    return [value for point in undisturbed.points[layout] for name, value in point.items() if name in ("loss", "grad_norm", "eval_loss")]


@pytest.mark.parametrize("layout", [name for name, (precision, _) in runs.LAYOUTS.items() if precision == "fp32"])
def test_sharding_offload_and_recomputing_leave_the_curve_alone(layout: str, undisturbed: Undisturbed) -> None:
    assert undisturbed.outcomes[layout].error is None
    expected = losses(undisturbed, "zero0")
    assert len(expected) == 2 * runs.LAYOUT_STEPS + 3
    assert losses(undisturbed, layout) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("layout", [name for name, (precision, _) in runs.LAYOUTS.items() if precision == "bf16"])
def test_bf16_is_near_fp32(layout: str, undisturbed: Undisturbed) -> None:
    assert losses(undisturbed, layout) == pytest.approx(losses(undisturbed, "zero1"), rel=0.05)
    assert losses(undisturbed, layout) != losses(undisturbed, "zero1")


def test_fp16_is_near_fp32_on_a_cpu_that_computes_in_it_and_refused_elsewhere(undisturbed: Undisturbed) -> None:
    error = undisturbed.outcomes["fp16"].error
    if torch.ops.mkldnn._is_mkldnn_fp16_supported():  # what DeepSpeed asks
        assert error is None
        assert losses(undisturbed, "fp16") == pytest.approx(losses(undisturbed, "zero1"), rel=0.05)
        return
    assert isinstance(error, ConfigError)
    assert 'precision = "fp16" is not supported' in str(error)
    assert 'take "bf16" or "fp32"' in str(error)
