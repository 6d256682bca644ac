"""How a training command ends: what went wrong first is what is told, and the run folder says it too."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from app.config.recipe import Recipe
from app.durable import read_json
from app.errors import DiskError, Interrupted, StorageError
from app.run_folder import RunFolder
from app.storage.mirror import Mirror
from jobs import local_ray
from jobs.run_storage import mirrored
from jobs.session import _ended, session


def recipe(tmp_path: Path, **run: Any) -> Recipe:
    return Recipe.model_validate({"run": {"dir": str(tmp_path / "run"), **run}})


def full(*arguments: Any, **options: Any) -> Any:
    raise OSError(28, "No space left on device")


def test_on_a_full_disk_the_first_error_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the one that its record in the run folder meets."""
    run = RunFolder.open(recipe(tmp_path), "sft")
    monkeypatch.setattr("app.run_folder.write_json", full)
    with pytest.raises(DiskError, match="the checkpoint of step 3"):
        with _ended(run):
            raise DiskError("the checkpoint of step 3 cannot be written")


def test_a_disk_that_is_full_for_any_file_of_the_run_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever part of a stage has met it: the report, answers side by side, a stage's manifest, or the record of the end itself."""
    run = RunFolder.open(recipe(tmp_path), "sft")
    expected = (
        r"report\.html cannot be written \(No space left on device\): free space there, or make it writable; the same command goes on$"
    )
    with pytest.raises(DiskError, match=expected), _ended(run):
        raise OSError(28, "No space left on device", str(run.path / "report.html"))
    assert read_json(run.path / "manifest.json")["sessions"][-1]["reason"].startswith(f"{run.path}/report.html cannot be written")
    with pytest.raises(ConnectionResetError), _ended(run):
        raise ConnectionResetError(104, "Connection reset by peer")
    monkeypatch.setattr("app.run_folder.write_json", full)
    with pytest.raises(DiskError, match=rf"^{run.path} cannot be written"), _ended(run):
        pass


def test_logs_that_cannot_be_kept_leave_no_ray_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[bool] = []
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", lambda **options: SimpleNamespace(address_info={"session_dir": str(tmp_path)}))
    monkeypatch.setattr(ray, "shutdown", lambda: ended.append(True))
    monkeypatch.setattr(local_ray, "keep_logs", full)
    with pytest.raises(DiskError, match="the checkpoint of step 3"):
        with local_ray.running_ray(tmp_path / "logs"):
            raise DiskError("the checkpoint of step 3 cannot be written")
    assert ended


def test_a_run_whose_storage_fails_at_the_start_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(self: Mirror, path: Path) -> None:
        raise StorageError("the URL lacks the last changes")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("app.storage.lease.SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(Mirror, "start", unreachable)
    with pytest.raises(StorageError, match="lacks the last changes"):
        with session(recipe(tmp_path, storage=f"file://{tmp_path}/kept"), "sft"):
            pass
    (last,) = read_json(tmp_path / "run" / "manifest.json")["sessions"]
    assert (last["outcome"], last["reason"]) == ("failed", "the URL lacks the last changes")


@pytest.mark.parametrize("failed", [False, True])
def test_who_interrupts_the_last_sending_is_told_what_was_not_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failed: bool) -> None:
    """Hours of work are in the folder; that nothing had begun would be untrue."""

    def interrupted(self: Mirror) -> None:
        raise KeyboardInterrupt

    def start(self: Mirror, path: Path) -> None:
        self._path = path
        self._thread.start()

    monkeypatch.setattr("app.storage.lease.SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(Mirror, "push", interrupted)
    monkeypatch.setattr(Mirror, "start", start)

    def run() -> None:
        with mirrored(recipe(tmp_path, storage=f"file://{tmp_path}/kept")) as mirror:
            assert mirror is not None
            mirror.start(tmp_path / "run")
            if failed:
                raise Interrupted("stopped")

    with pytest.raises(Interrupted, match=r"file://.*kept lacks the last changes of .*run .stopped.: the same command sends them"):
        run()


def test_a_machine_without_shared_memory_gets_the_smallest_object_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_ray, "SHARED_MEMORY", str(tmp_path / "none"))
    assert local_ray.object_store_bytes() == local_ray.OBJECT_STORE_BYTES[0]
