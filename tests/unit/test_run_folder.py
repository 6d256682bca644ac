"""Which run a folder belongs to, and which of its stages count as finished."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from app import durable, run_folder
from app.config.recipe import Recipe
from app.durable import tree_hash
from app.errors import CheckpointError
from app.run_folder import RunFolder
from app.run_layout import LOCK


def recipe(path: Path, **sections: object) -> Recipe:
    sections["run"] = {"dir": str(path), **dict(sections.get("run", {}))}  # type: ignore[call-overload]
    return Recipe.model_validate(sections)


def write_model(folder: Path, weights: str = "weights") -> None:
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "model.safetensors").write_text(weights)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_finished_stage_is_found_again_with_its_results(tmp_path: Path) -> None:
    run = RunFolder.open(recipe(tmp_path / "run"), "pipeline")
    write_model(run.stage("sft"))
    assert run.finished("sft") is None
    digest = run.finish("sft", {"eval_loss_after": 1.5, "bad": float("nan")}, {"data": "abc"})
    assert digest == tree_hash(run.path / "sft" / "model")
    again = RunFolder.open(recipe(tmp_path / "run"), "pipeline")
    assert again.finished("sft") == {"eval_loss_after": 1.5, "bad": None}
    chain = json.loads((run.path / "manifest.json").read_text())
    assert chain["stages"]["sft"]["parents"] == {"data": "abc"}
    assert len(chain["sessions"]) == 2
    assert chain["sessions"][0]["command"] == "pipeline"
    assert chain["config"]["ppo"]["batch_size"] == 64


def test_a_kill_between_the_two_records_of_a_finished_stage_leaves_it_in_the_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder.open(recipe(tmp_path), "pipeline")
    write_model(run.stage("sft"))

    def killed(path: Path, value: Any) -> None:
        if path == tmp_path / "manifest.json":
            raise KeyboardInterrupt
        durable.write_json(path, value)

    with monkeypatch.context() as dying:
        dying.setattr(run_folder, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            run.finish("sft", {"steps": 3}, {"data": "abc"})
    again = RunFolder.open(recipe(tmp_path), "pipeline")
    assert again.finished("sft") == {"steps": 3}
    chain = json.loads((tmp_path / "manifest.json").read_text())["stages"]
    assert chain["sft"]["parents"] == {"data": "abc"}
    assert chain["sft"]["sha256"] == tree_hash(tmp_path / "sft" / "model")


def test_keys_that_do_not_change_the_result_may_differ(tmp_path: Path) -> None:
    run = RunFolder.open(recipe(tmp_path / "a"), "sft")
    run.finish("sft", {"steps": 3}, {})
    del run  # and with it the lock
    (tmp_path / "a").rename(tmp_path / "b")
    changed: dict[str, dict[str, object]] = {"run": {"deadline_seconds": 5}, "tracking": {"name": "b"}, "sft": {"keep_checkpoints": 1}}
    changed |= {"alarms": {"kl": {"limit": 1}}, "ppo": {"keep_rollouts": 3}}
    moved = RunFolder.open(recipe(tmp_path / "b", **changed), "sft")
    assert moved.finished("sft") == {"steps": 3}


@pytest.mark.parametrize(("objective", "decides"), [("training", False), ("hold_out", False), ("held_out", True), ("gold", True)])
@pytest.mark.parametrize(("key", "value"), [("seed", 7), ("prompts", 8)])
def test_what_held_out_answers_depend_on_belongs_to_a_search_that_is_judged_by_them(
    tmp_path: Path, objective: str, decides: bool, key: str, value: int
) -> None:
    run = RunFolder.open(recipe(tmp_path, tune={"objective": objective}), "tune")
    run.record_data("0" * 64)
    run.finish("sft", {"steps": 3}, {})
    del run  # and with it the lock
    changed = recipe(tmp_path, tune={"objective": objective}, evaluation={key: value, "examples": 1})
    if decides:
        with pytest.raises(CheckpointError, match=rf"evaluation\.{key} was \d+ and is now {value}\. Choose"):
            RunFolder.open(changed, "tune")
    else:
        assert RunFolder.open(changed, "tune").finished("sft") == {"steps": 3}


def test_a_search_by_held_out_answers_from_before_these_were_noted_goes_on(tmp_path: Path) -> None:
    searched = recipe(tmp_path, tune={"objective": "held_out"})
    run = RunFolder.open(searched, "tune")
    run.finish("sft", {"steps": 3}, {})
    manifest = json.loads((tmp_path / "sft" / "manifest.json").read_text())
    manifest["config"] = {key: value for key, value in manifest["config"].items() if not key.startswith("evaluation.")}
    (tmp_path / "sft" / "manifest.json").write_text(json.dumps(manifest))
    del run
    assert RunFolder.open(searched, "tune").finished("sft") == {"steps": 3}


def test_another_config_is_refused_by_key_and_nothing_is_touched(tmp_path: Path) -> None:
    run = RunFolder.open(recipe(tmp_path), "pipeline")
    write_model(run.stage("sft"))
    run.finish("sft", {}, {})
    before = snapshot(tmp_path)
    with pytest.raises(CheckpointError) as refused:
        RunFolder.open(recipe(tmp_path, ppo={"batch_size": 32}, run={"seed": 2}), "pipeline")
    message = str(refused.value)
    assert "ppo.batch_size was 64 and is now 32" in message
    assert "run.seed was 1 and is now 2" in message
    assert "--run.dir" in message
    assert "\n" not in message
    assert refused.value.exit_code == 2
    assert snapshot(tmp_path) == before


def test_many_differences_are_counted_not_listed(tmp_path: Path) -> None:
    RunFolder.open(recipe(tmp_path), "pipeline").record_data("0" * 64)
    changed = {"steps": 7, "batch_size": 32, "epochs": 1, "micro_batch_size": 8, "save_every": 9, "max_lag": 1, "kl": {"coef": 0.2}}
    with pytest.raises(CheckpointError, match="; 2 more"):
        RunFolder.open(recipe(tmp_path, ppo=changed), "pipeline")


def test_resume_false_wants_an_empty_folder(tmp_path: Path) -> None:
    RunFolder.open(recipe(tmp_path / "run", run={"resume": False}), "sft")
    with pytest.raises(CheckpointError, match="not empty"):
        RunFolder.open(recipe(tmp_path / "run", run={"resume": False}), "sft")


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_broken_manifest_is_an_error_not_a_new_run(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        RunFolder.open(recipe(tmp_path), "sft")
    assert (tmp_path / "manifest.json").read_text() == text


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        RunFolder.open(recipe(tmp_path / "run"), "sft")
    with pytest.raises(CheckpointError, match="cannot be written"):
        RunFolder.open(recipe(tmp_path / "run" / "below"), "sft")


@pytest.mark.parametrize("weights", [None, "shorter", "strange"])
def test_a_stage_whose_model_is_gone_or_changed_is_unfinished(tmp_path: Path, weights: str | None) -> None:
    run = RunFolder.open(recipe(tmp_path), "pipeline")
    write_model(run.stage("sft"))
    run.finish("sft", {}, {})
    assert run.model("sft") == str(run.path / "sft" / "model")
    if weights is None:
        (run.path / "sft" / "model" / "model.safetensors").unlink()
    else:
        write_model(run.path / "sft", weights)
    assert run.finished("sft") is None
    with pytest.raises(CheckpointError, match="not finished, or its files have changed"):
        run.model("sft")


def test_a_process_hashes_the_files_of_a_stage_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Path] = []

    def damage(folder: Path, files: Mapping[str, Any]) -> str | None:
        hashed.append(folder)
        return durable.damage(folder, files)

    monkeypatch.setattr(run_folder, "damage", damage)
    run = RunFolder.open(recipe(tmp_path), "pipeline")
    assert run.results("sft") is None
    write_model(run.stage("sft"))
    run.finish("sft", {"steps": 3}, {})
    assert run.results("sft") == {"steps": 3} and hashed == []
    resumed = RunFolder.open(recipe(tmp_path), "pipeline")
    assert [resumed.results("sft") for _ in range(2)] == [{"steps": 3}] * 2
    assert hashed == [run.path / "sft"]
    (run.path / "sft" / "model" / "model.safetensors").unlink()
    assert resumed.results("sft") is None


def test_a_stage_built_on_a_parent_that_was_trained_again_is_unfinished(tmp_path: Path) -> None:
    run = RunFolder.open(recipe(tmp_path), "pipeline")
    write_model(run.stage("sft"))
    sft = run.finish("sft", {}, {"data": "abc"})
    run.finish("rm", {"pair_accuracy": 0.9}, {"sft": sft})
    assert run.finished("rm") == {"pair_accuracy": 0.9}
    write_model(run.stage("sft"), "other weights")
    run.finish("sft", {}, {"data": "abc"})
    assert run.finished("rm") is None


def test_other_data_under_the_same_config_is_refused(tmp_path: Path) -> None:
    run = RunFolder.open(recipe(tmp_path), "pipeline")
    run.record_data("a" * 64, path="embedded")
    again = RunFolder.open(recipe(tmp_path), "pipeline")
    again.record_data("a" * 64, path="embedded")
    with pytest.raises(CheckpointError, match="has changed since the run began"):
        again.record_data("b" * 64, path="embedded")


def test_summary_is_valid_json_whatever_the_numbers(tmp_path: Path) -> None:
    run = RunFolder.open(recipe(tmp_path), "pipeline")
    path = run.write_summary({"ppo": {"kl": float("inf"), "win_rate": {"mean": 0.5, "low": 0.4, "high": 0.6}}})
    assert json.loads(path.read_text()) == {"ppo": {"kl": None, "win_rate": {"mean": 0.5, "low": 0.4, "high": 0.6}}}


def test_a_second_process_is_kept_out(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    hold = (
        "import sys; from filelock import FileLock; lock = FileLock(sys.argv[1]); "
        "lock.acquire(); print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", hold, str(folder / LOCK)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match="in use by another process"):
            RunFolder.open(recipe(folder), "sft")
        assert not (folder / "manifest.json").exists()
        holder.communicate()
    RunFolder.open(recipe(folder), "sft")


def test_a_run_that_never_read_its_data_may_change(tmp_path: Path) -> None:
    """Whoever corrects a wrong data option after the first attempt can keep the folder."""
    RunFolder.open(recipe(tmp_path, data={"strict": True}), "sft")
    run = RunFolder.open(recipe(tmp_path, data={"strict": False}), "sft")
    run.record_data("0" * 64)
    with pytest.raises(CheckpointError, match=r"data\.strict"):
        RunFolder.open(recipe(tmp_path, data={"strict": True}), "sft")


def test_a_key_that_is_newer_than_the_run_has_its_default(tmp_path: Path) -> None:
    """A run that an older version began goes on."""
    run = RunFolder.open(recipe(tmp_path), "sft")
    run.record_data("0" * 64)
    run.finish("sft", {"steps": 3}, {})
    for file in (tmp_path / "manifest.json", tmp_path / "sft" / "manifest.json"):
        manifest = json.loads(file.read_text())
        manifest["config"].get("ppo", {}).pop("max_lag", None)
        manifest["config"].pop("ppo.max_lag", None)
        file.write_text(json.dumps(manifest))
    assert RunFolder.open(recipe(tmp_path), "sft").finished("sft") == {"steps": 3}
    with pytest.raises(CheckpointError, match=r"ppo\.max_lag was 0 and is now 1"):
        RunFolder.open(recipe(tmp_path, ppo={"max_lag": 1}), "sft")


def test_a_run_with_free_keys_goes_on(tmp_path: Path) -> None:
    free = {"sft": {"deepspeed": {"extra": {"wall_clock_breakdown": True}}}}
    RunFolder.open(recipe(tmp_path, **free), "sft").record_data("0" * 64)
    RunFolder.open(recipe(tmp_path, **free), "sft")
    with pytest.raises(CheckpointError, match=r"sft\.deepspeed\.extra"):
        RunFolder.open(recipe(tmp_path), "sft")
