"""A checkpoint is complete or it does not exist, whatever moment the save dies at."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from app.checkpoint import CheckpointStore, OverlappedCheckpoints, read_checkpoint
from app.durable import tree_hash, wrong_size
from app.errors import CheckpointError, DeadlineError, DiskError, NonFiniteError
from tests.waiting import wait_until


def parts(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "policy").mkdir()
        (folder / "policy" / "weights.bin").write_text(text)
        (folder / "rng.bin").write_bytes(b"1234")

    return write


def test_latest_returns_what_was_saved(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    assert store.latest() is None
    store.save(5, {"kl_coef": 0.05, "cursor": [3, 1]}, parts("five"))
    saved = CheckpointStore(tmp_path / "checkpoints", keep=2).latest()
    assert saved is not None
    assert (saved.step, saved.state) == (5, {"kl_coef": 0.05, "cursor": [3, 1]})
    assert (saved.path / "policy" / "weights.bin").read_text() == "five"


def test_retention_keeps_the_newest_and_comes_after_the_commit(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for step in (10, 20):
        store.save(step, {}, parts(str(step)))
    seen: list[list[str]] = []
    store.save(30, {}, lambda folder: seen.append(sorted(p.name for p in tmp_path.glob("step-*"))))
    assert seen == [["step-00000010", "step-00000020"]], "nothing may go before the new checkpoint is complete"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000020", "step-00000030"]


def test_a_write_that_raises_leaves_the_earlier_checkpoint(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    store.save(1, {}, parts("one"))

    def dies(folder: Path) -> None:
        (folder / "weights.bin").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.save(2, {}, dies)
    saved = store.latest()
    assert saved is not None
    assert saved.step == 1
    store.save(2, {}, parts("two"))
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000002"], "leftovers of the failed save are cleared by the next one"


@contextmanager
def little_room(size: int) -> Iterator[None]:
    """No file of this process may become larger: what a full disk is to whoever writes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def write_bytes(folder: Path) -> None:
    (folder / "weights.bin").write_bytes(bytes(5000))


def write_tensors(folder: Path) -> None:
    torch.save({"weights": torch.zeros(5000)}, folder / "weights.pt")


@pytest.mark.parametrize(("write", "reason"), [(write_bytes, "File too large"), (write_tensors, ".*"), (parts("two"), "File too large")])
def test_a_full_disk_is_told_in_one_line_and_leaves_the_earlier_checkpoint(
    tmp_path: Path, write: Callable[[Path], None], reason: str
) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep=1)
    first = store.save(1, {}, parts("one"))
    state = {"large": "x" * 5000} if reason == "File too large" else {}  # where the parts have room, the manifest has none
    expected = rf"^{tmp_path}/checkpoints: the checkpoint of step 2 cannot be written \({reason}\): free space there, or [^\n]*$"
    with little_room(2000), pytest.raises(DiskError, match=expected) as raised:
        store.save(2, state, write)
    assert isinstance(raised.value.__cause__, OSError | RuntimeError)
    assert [path.name for path in store.folder.iterdir()] == [first.name], "what is half written keeps the disk full"
    saved = store.latest()
    assert saved is not None and saved.step == 1
    store.save(2, state, write)
    saved = store.latest()
    assert saved is not None and saved.step == 2


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "ppo").touch()
    with pytest.raises(DiskError, match=r"ppo/checkpoints: the checkpoint of step 1 cannot be written \(Not a directory\)"):
        CheckpointStore(tmp_path / "ppo" / "checkpoints").save(1, {}, parts("one"))


@pytest.mark.parametrize("error", [DeadlineError("learner: save: no answer"), RuntimeError("a bug"), CheckpointError("rank 1")])
def test_what_is_not_the_disks_fault_is_raised_as_it_is(tmp_path: Path, error: Exception) -> None:
    def fail(folder: Path) -> None:
        raise error

    with pytest.raises(type(error)) as raised:
        CheckpointStore(tmp_path).save(1, {}, fail)
    assert raised.value is error


@pytest.mark.parametrize("state", [{"best": float("inf")}, {"what": object()}])
def test_a_state_that_json_cannot_hold_is_refused_and_nothing_committed(tmp_path: Path, state: dict[str, object]) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    with pytest.raises((ValueError, TypeError)):
        store.save(1, state, parts("one"))
    assert store.latest() is None


def cut_a_part(path: Path) -> None:
    (path / "policy" / "weights.bin").write_text("t")


def change_a_part(path: Path) -> None:
    (path / "policy" / "weights.bin").write_text("owt")  # same size


def remove_a_part(path: Path) -> None:
    (path / "rng.bin").unlink()


def remove_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def cut_manifest(path: Path) -> None:
    manifest = path / "manifest.json"
    manifest.write_text(manifest.read_text()[:40])


def empty_manifest(path: Path) -> None:
    (path / "manifest.json").write_text("{}")


@pytest.mark.parametrize("harm", [cut_a_part, change_a_part, remove_a_part, remove_manifest, cut_manifest, empty_manifest])
def test_an_incomplete_checkpoint_is_passed_over(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    store = CheckpointStore(tmp_path, keep=3)
    store.save(1, {}, parts("one"))
    harm(store.save(2, {}, parts("two")))
    saved = store.latest()
    assert saved is not None
    assert saved.step == 1


def test_damaged_checkpoints_alone_are_refused_and_not_taken_for_none(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=3)
    for step in (1, 2):
        remove_a_part(store.save(step, {}, parts("any")))
    with pytest.raises(CheckpointError, match=r"step-00000002 and all older checkpoints are damaged.*delete the folder"):
        store.latest()


def test_temporary_folders_never_count(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=3)
    first = store.save(1, {}, parts("one"))
    for name in (".saving-step-00000002", ".removing-step-00000003"):
        shutil.copytree(first, tmp_path / name)
    saved = store.latest()
    assert saved is not None
    assert saved.path == first


def test_a_step_saved_again_never_leaves_a_gap(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    store.save(4, {"copy": 1}, parts("a"))

    def write(folder: Path) -> None:
        during = store.latest()
        assert during is not None
        assert during.state == {"copy": 1}
        parts("b")(folder)

    store.save(4, {"copy": 2}, write)
    saved = store.latest()
    assert saved is not None
    assert saved.state == {"copy": 2}
    assert len(list(tmp_path.iterdir())) == 1


def test_saving_after_a_resume_from_an_older_step_drops_the_later_damaged_one(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    store.save(10, {}, parts("ten"))
    cut_a_part(store.save(20, {}, parts("two")))
    store.save(15, {}, parts("15"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000010", "step-00000015"]


def steps_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("step-*"))


def test_a_checkpoint_is_committed_while_the_caller_goes_on_and_changes_what_was_written(tmp_path: Path, disk: threading.Event) -> None:
    weights, state = ["one"], {"step": 1}
    with OverlappedCheckpoints(CheckpointStore(tmp_path), deadline_seconds=60) as checkpoints:
        checkpoints.save(1, state, lambda folder: parts(weights[0])(folder))
        weights[0], state["step"] = "two", 2
        checkpoints.settle(wait_for_it=False)
        assert steps_in(tmp_path) == []
        disk.set()
        checkpoints.settle()
        assert steps_in(tmp_path) == ["step-00000001"]
        checkpoints.save(2, state, lambda folder: parts(weights[0])(folder))
    assert steps_in(tmp_path) == ["step-00000001", "step-00000002"], "nothing is under way after the block"
    saved = read_checkpoint(tmp_path / "step-00000001")
    assert saved is not None and saved.state == {"step": 1}
    assert (saved.path / "policy" / "weights.bin").read_text() == "one"


def test_the_next_checkpoint_waits_for_the_one_before(tmp_path: Path, disk: threading.Event) -> None:
    with OverlappedCheckpoints(CheckpointStore(tmp_path), deadline_seconds=60) as checkpoints:
        checkpoints.save(1, {}, parts("one"))
        threading.Timer(0.05, disk.set).start()
        seen: list[list[str]] = []
        checkpoints.save(2, {}, lambda folder: seen.append(steps_in(tmp_path)))
        assert seen == [["step-00000001"]]


def test_a_commit_that_fails_is_told_at_the_next_look_and_the_earlier_checkpoint_stays(
    tmp_path: Path, disk: threading.Event, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Path) -> None:
        disk.wait(60)
        raise OSError(errno.ENOSPC, "No space left on device")

    checkpoints = OverlappedCheckpoints(CheckpointStore(tmp_path), deadline_seconds=60)
    disk.set()
    CheckpointStore(tmp_path).save(1, {}, parts("one"))
    disk.clear()
    monkeypatch.setattr("app.checkpoint.sync_tree", full)
    checkpoints.save(2, {}, parts("two"))
    checkpoints.settle(wait_for_it=False)
    disk.set()
    with pytest.raises(DiskError, match=r"the checkpoint of step 2 cannot be written .No space left on device"):
        checkpoints.settle()
    checkpoints.settle()  # told once
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    with pytest.raises(DiskError), checkpoints:
        checkpoints.save(3, {}, parts("three"))
    checkpoints.save(4, {}, parts("four"))
    with pytest.raises(NonFiniteError), checkpoints:
        raise NonFiniteError("loss")
    assert "the checkpoint of step 4 cannot be written" in caplog.text


def test_a_commit_without_end_is_late(tmp_path: Path, disk: threading.Event) -> None:
    checkpoints = OverlappedCheckpoints(CheckpointStore(tmp_path), deadline_seconds=0.01)
    checkpoints.save(1, {}, parts("one"))
    with pytest.raises(DeadlineError, match=r"a checkpoint is not on the disk after 0.01 s"):
        checkpoints.settle()


def test_a_commit_that_is_late_is_not_waited_for_again_at_the_end(
    tmp_path: Path, disk: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []

    def nothing_done(futures: object, timeout: float) -> SimpleNamespace:
        waited.append(timeout)
        return SimpleNamespace(done=set())

    monkeypatch.setattr("app.checkpoint.wait", nothing_done)
    checkpoints = OverlappedCheckpoints(CheckpointStore(tmp_path), deadline_seconds=1800)
    checkpoints.save(1, {}, parts("one"))
    with pytest.raises(DeadlineError), checkpoints:
        checkpoints.settle()
    assert sum(waited) == 1800


SAVER = """
import sys, time
from pathlib import Path
from app.checkpoint import CheckpointStore, OverlappedCheckpoints
def write(folder):
    (folder / "weights.bin").write_bytes(b"x" * 50_000)
store = CheckpointStore(Path(sys.argv[1]), keep=2)
if sys.argv[2:]:
    store = OverlappedCheckpoints(store, deadline_seconds=60)
for step in range(1, 10_000):
    store.save(step, {"step": step}, write)
"""


@pytest.mark.parametrize("options", [[], ["overlapped"]])
def test_sigkill_at_any_moment_leaves_a_complete_latest(tmp_path: Path, options: list[str]) -> None:
    for delay in (0.0, 0.013, 0.031):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVER, str(tmp_path), *options], env={**os.environ, "PYTHONPATH": str(Path.cwd())}
        )
        wait_until(lambda: list(tmp_path.glob("step-*")), "a checkpoint", process=process)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        saved = CheckpointStore(tmp_path, keep=2).latest()
        assert saved is not None
        assert saved.state == {"step": saved.step}
        assert (saved.path / "weights.bin").stat().st_size == 50_000
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()


def test_tree_hash_sees_names_and_contents_only(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "deep" / "config.json").write_text(json.dumps({"x": 1}))
    os.utime(tmp_path / "b" / "deep" / "config.json", (1, 1))
    assert tree_hash(tmp_path / "a") == tree_hash(tmp_path / "b")
    (tmp_path / "b" / "deep" / "config.json").rename(tmp_path / "b" / "config.json")
    assert tree_hash(tmp_path / "a") != tree_hash(tmp_path / "b")


@pytest.mark.parametrize(("number", "reason"), [(errno.EACCES, "Permission denied"), (errno.ESTALE, "Stale file handle")])
def test_a_folder_that_cannot_be_listed_is_not_taken_for_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, reason: str
) -> None:
    """The run would begin anew, and its first checkpoint would drop the later ones."""
    store = CheckpointStore(tmp_path, keep=1)
    store.save(100, {}, parts("hours of work"))

    def refuse(path: object) -> object:
        raise OSError(number, reason)

    with monkeypatch.context() as broken:
        for name in ("scandir", "listdir"):
            broken.setattr(os, name, refuse)
        with pytest.raises(CheckpointError, match=rf"^{tmp_path}: cannot be read \({reason}\): mend that"):
            store.latest()
    saved = store.latest()
    assert saved is not None and saved.step == 100


def test_a_checkpoint_that_a_newer_one_replaces_while_it_is_read_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `corral export` may find them beside a run."""
    store = CheckpointStore(tmp_path, keep=1)
    store.save(1, {}, parts("one"))
    looked_at_sizes = wrong_size

    def replaced_meanwhile(folder: Path, files: Mapping[str, Any]) -> str | None:
        found = looked_at_sizes(folder, files)
        if folder.name == "step-00000001":
            CheckpointStore(tmp_path, keep=1).save(2, {}, parts("two"))
        return found

    monkeypatch.setattr("app.durable.wrong_size", replaced_meanwhile)
    saved = store.latest()
    assert saved is not None and saved.step == 2
