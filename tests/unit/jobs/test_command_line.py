"""The command line: help, dry runs, overrides, signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from app.config.loading import load_recipe
from app.errors import Interrupted
from jobs import interrupts
from jobs.main import RECIPE_COMMANDS, TOOLS, main, split_overrides

RECIPES = Path(__file__).resolve().parents[3] / "jobs" / "recipes"
TINY = str(RECIPES / "tiny" / "pipeline.toml")


@pytest.mark.parametrize("command", RECIPE_COMMANDS)
def test_help_lists_the_keys_the_command_reads(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert f"corral {command}" in text
    for section in RECIPE_COMMANDS[command].sections:
        assert f"--{section}." in text


def test_help_names_what_a_value_is_chosen_from_and_keys_as_they_are_typed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["ppo", "--help"])
    lines = capsys.readouterr().out.splitlines()
    for line in (
        '--model.precision ("fp32"): fp32 | bf16 | fp16',
        '--alarms.kl.action ("warn"): warn | stop | off',
        "--ppo.kl.place (not set): reward | loss | both | null",
        "--tracking.also ([]): list of wandb | mlflow",
        "--ppo.steps (100)",
        "--data.sets.NAME.path (not set)",
        "--reward.parts.NAME.type (required)",
        "--reward.parts.NAME.weight (1.0)",
        "--alarms.kl.limit (100.0)",
        "--alarms.entropy.limit (0.01)",
    ):
        assert f"  {line}" in lines
    assert not any(line.startswith("  --data.sets.path") for line in lines)


@pytest.mark.parametrize("module", ["jobs", "jobs.main"])
def test_the_command_line_runs_as_a_module(module: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: corral")


@pytest.mark.parametrize("command", TOOLS)
def test_help_of_tools(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert f"corral {command}" in capsys.readouterr().out


@pytest.mark.parametrize("command", RECIPE_COMMANDS)
def test_dry_run_prints_a_recipe_that_reads_back(command: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main([command, TINY, "--dry-run", "--run.seed", "7"]) == 0
    text = capsys.readouterr().out
    assert tomllib.loads(text)["run"]["seed"] == 7
    assert f"# corral {command}: derived sizes" in text
    assert "# needs" in text
    printed = tmp_path / "printed.toml"
    printed.write_text(text)
    assert load_recipe(printed) == load_recipe(TINY, ["--run.seed=7"])


def test_dry_run_of_a_recipe_for_a_larger_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ppo", str(RECIPES / "pythia" / "ppo-12b.toml"), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "8 GPUs" in text
    assert "accumulation 8" in text


def test_overrides_may_stand_before_the_recipe() -> None:
    words = ["ppo", "--run.dir", "x", "a.toml", "--dry-run", "--ppo.kl.coef=1", "--ppo.kl.coef", "-2"]
    assert split_overrides(words) == (["ppo", "a.toml", "--dry-run"], ["--run.dir", "x", "--ppo.kl.coef=1", "--ppo.kl.coef", "-2"])


def test_sigterm_is_an_interrupt_and_cleaning_up_is_not_disturbed() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with interrupts.installed():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        with interrupts.shielded():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_interrupted_run_exits_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(_: object) -> None:
        raise Interrupted("stopped; the same command goes on")

    monkeypatch.setitem(RECIPE_COMMANDS, "sft", type("Stub", (), {"run": staticmethod(stop), "sections": (), **TEXTS})())
    assert main(["sft", TINY]) == 130
    assert capsys.readouterr().err == "corral: error: stopped; the same command goes on\n"


TEXTS = {"purpose": "", "details": "", "example": ""}


def test_doctor_reports_a_recipe_that_does_not_fit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from jobs import doctor
    from jobs.diagnosis import machine

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(machine, "imports", lambda: doctor.Check("imports", "not now"))
    assert main(["doctor", str(RECIPES / "pythia" / "ppo-12b.toml"), "--for", "ppo"]) == 1
    out = capsys.readouterr().out
    assert "FAILED recipe: stage ppo needs 8 GPUs" in out
    assert f"ok     cores: {len(os.sched_getaffinity(0))}" in out


def test_a_dry_run_tells_what_a_run_would_be_refused_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sft", "jobs/recipes/tiny/sft.toml", "--data.path=./missing.jsonl", "--dry-run"]) == 0
    assert "# would be refused here and now: " in (told := capsys.readouterr().out) and "missing.jsonl" in told
    assert main(["sft", "jobs/recipes/tiny/sft.toml", "--dry-run"]) == 0
    assert "refused" not in capsys.readouterr().out


def test_a_dry_run_tells_of_too_small_a_machine_and_of_all_else_that_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What the command itself says before Ray starts, each on a line of its own; of a cluster nobody is asked."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("jobs.local_ray.local_cpus", lambda: 2)
    monkeypatch.setattr("jobs.local_ray.local_gpus", lambda: 0)
    monkeypatch.setattr("jobs.local_ray.join_cluster", lambda: pytest.fail("a cluster was asked"))
    twelve = ["ppo", str(RECIPES / "pythia" / "ppo-12b.toml"), f"--run.dir={tmp_path / 'run'}", "--data.path=./missing.jsonl", "--dry-run"]
    assert main(twelve) == 0
    refusals = [line for line in capsys.readouterr().out.splitlines() if line.startswith("# would be refused here and now: ")]
    assert "stage ppo needs 8 GPUs" in refusals[0] and "missing.jsonl" in refusals[1]
    assert main(["sft", TINY, "--sft.workers.count=4", "--sft.micro_batch_size=4", "--dry-run"]) == 0
    assert "# would be refused here and now: stage sft needs 4 CPUs (sft 4 x 1) and the cluster has 2" in capsys.readouterr().out
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert main(twelve) == 0
    text = capsys.readouterr().out
    assert "needs 8 GPUs (" not in text and "missing.jsonl" in text
    assert "# whether the cluster at RAY_ADDRESS = 10.0.0.1:6379 has room" in text and "corral doctor" in text


def test_a_dry_run_tells_of_a_folder_that_holds_another_run_and_of_a_missing_package(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from app.run_folder import RunFolder

    folder = tmp_path / "run"
    RunFolder.open(load_recipe(TINY, [f"--run.dir={folder}"]), "pipeline").record_data("0" * 64)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    monkeypatch.setattr("app.trackers.opening.importlib.util.find_spec", lambda name, package=None: None)
    assert main(["pipeline", TINY, f"--run.dir={folder}", "--ppo.steps=7", '--tracking.also=["wandb"]', "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert f"# would be refused here and now: run folder {folder} holds a run of another configuration: ppo.steps was" in text
    assert "# would be refused here and now: tracking.also = wandb" in text
    assert main(["pipeline", TINY, f"--run.dir={folder}", "--run.resume=false", "--dry-run"]) == 0
    assert f"run folder {folder} is not empty and run.resume is false" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
