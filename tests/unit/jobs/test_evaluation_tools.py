"""`corral evaluate ACTION`: how actions are told from recipes, and bad input in one line before a model is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.evaluate_samples import default_name
from jobs.main import TOOLS, join_tool_name, main
from tests.tiny_models import make_neox, make_reward_model
from tests.unit.evaluation.reports import as_json

ACTIONS = [name.split()[1] for name in TOOLS if name.startswith("evaluate ")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """lm: a causal LM; rm: a reward model; report.json; pairs.jsonl: ranked; prompts.jsonl."""
    folder = tmp_path_factory.mktemp("given")
    make_reward_model(folder / "rm", make_neox(folder / "lm"))
    (folder / "report.json").write_text(json.dumps(as_json({"Why?": {"k50": ["a", "b"]}})))
    (folder / "empty.json").write_text(json.dumps(as_json({"Why?": {"k50": []}})))
    (folder / "alike.json").write_text(json.dumps(as_json({"Why?": {"k50": ["a", "a"]}})))
    (folder / "pairs.jsonl").write_text(json.dumps({"prompt": "Why?", "responses": ["good", "bad"]}) + "\n")
    (folder / "prompts.jsonl").write_text('"Why?"\n"How?"\n')
    (folder / "conversation.jsonl").write_text(json.dumps({"instruction": "a", "response": "b"}) + "\n")
    (folder / "beam.json").write_text(json.dumps({"configurations": [{"name": "beam5", "generate_args": {"num_beams": 5}}]}))
    return folder


@pytest.fixture
def refused(folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command in the folder of files; it must fail with code 2 and one line, without Ray or weights. Returns the line."""
    import ray
    import transformers

    def started(*_: Any, **__: Any) -> None:
        pytest.fail("Ray was started, or a model loaded")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", started)
    monkeypatch.setattr(transformers.AutoModelForSequenceClassification, "from_pretrained", started)
    monkeypatch.chdir(folder)

    def run(*words: str) -> str:
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
        assert main(["evaluate", *words]) == 2
        error = capfd.readouterr().err
        assert error.startswith("corral: error: ") and error.count("\n") == 1
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before
        return error

    return run


def test_actions_are_known_by_the_second_word() -> None:
    assert ACTIONS == ["rm", "samples", "score", "best-of-n", "trees"]
    assert join_tool_name(["evaluate", "samples", "--model", "m"]) == ["evaluate samples", "--model", "m"]
    assert join_tool_name(["evaluate", "recipe.toml", "rm"]) == ["evaluate", "recipe.toml", "rm"]


@pytest.mark.parametrize("action", ACTIONS)
def test_help_as_it_is_typed(action: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", action, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: corral evaluate {action} ")
    assert ("--model.precision" in text) == (action != "trees")
    assert "--ppo." not in text


def test_the_comparison_of_a_run_names_its_tools(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    text = capsys.readouterr().out
    assert text.startswith("usage: corral evaluate [-h] [--resume] [--dry-run] RECIPE")
    assert all(action in text for action in ACTIONS)


SCORE, BEST, TREES = ["score", "report.json", "--model=rm"], ["best-of-n", "report.json", "--model=rm", "--output=best"], ["trees"]
SAMPLES = ["samples", "--model=lm", "--prompts=prompts.jsonl"]
RM = ["rm", "pairs.jsonl", "--model=rm"]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["rm", "pairs.jsonl"], "--model: `corral evaluate rm --help`"),
        (["rm", "nowhere.jsonl", "--model=rm", "--data.max_length=128"], "no such file, folder or glob"),
        (["rm", "prompts.jsonl", "--model=rm", "--data.max_length=128"], "no prompt with two or more ranked replies"),
        (["rm", "pairs.jsonl", "--model=./nowhere"], "no such folder"),
        (["rm", "pairs.jsonl", "--model=lm"], "one label, this one has 2"),
        (RM, "data.max_length = 512 tokens, and the model's context is 128"),
        ([*RM, "--ppo.steps=3"], "corral evaluate rm does not read ppo.steps"),
        ([*RM, "--data.max_lenth=3"], "did you mean data.max_length?"),
        ([*RM, "--json=."], "is a folder"),
        ([*RM, "--json=/proc/rm.json"], "/proc/rm.json: its folder cannot be written"),
        ([*BEST[:-1], "--output=/proc"], "/proc: its folder cannot be written"),
        (["samples", "--model=lm"], "--prompts"),
        (["samples", "--model=lm", "--prompts=nowhere.jsonl"], "no such file, folder or glob"),
        (["samples", "--model=./nowhere", "--prompts=prompts.jsonl"], "no such folder"),
        (["samples", "--model=rm", "--prompts=prompts.jsonl"], "a reward model or an encoder writes no answers"),
        ([*SAMPLES, "--config=nowhere.json"], "nowhere.json: cannot be read"),
        ([*SAMPLES, "--config=beam.json"], "beam.json: configuration 1 (beam5): generate_args.num_beams = 5"),
        ([*SAMPLES, "--num-samples=0"], "--num-samples=0"),
        ([*SAMPLES, "-n", "0"], "--n=0"),
        ([*SAMPLES, "--max-new-tokens=126"], "longest prompt + max_new_tokens = 133 tokens, and the model's context is 128"),
        ([*SAMPLES, "--rollout.temperature=2"], "does not read rollout.temperature"),
        ([*SAMPLES, "--max-new-tokens=8", "--rollout.engines.gpus=64"], "needs 64 GPUs"),
        ([*SAMPLES, "--beams=4"], "--beams: no such option"),
        (["score", "nowhere.json", "--model=rm"], "nowhere.json: cannot be read"),
        (["score", "prompts.jsonl", "--model=rm"], "no valid JSON"),
        (["score", "empty.json", "--model=rm"], "no prompt in it has an output"),
        (["score", "report.json", "--model=lm", "--data.max_length=128"], "one label, this one has 2"),
        ([*SCORE, "--keep=2"], "--keep: no such option"),
        ([*SCORE, "--output=report.json/a"], "report.json/a: its folder cannot be made"),
        ([*BEST, "--keep=0"], "--keep=0"),
        ([*BEST[:-1], "--output=report.json"], "its folder cannot be made"),
        (["best-of-n", "empty.json", "--model=rm", "--output=best"], "no prompt in it has an output"),
        (["trees", "report.json", "nowhere.json", "--output=t.jsonl"], "nowhere.json: cannot be read"),
        (["trees", "alike.json", "--output=t.jsonl"], "fewer than two distinct answers"),
        (["trees", "report.json", "--output=t.jsonl", "--replies=1"], "--replies=1"),
        (["trees", "report.json", "--output=t.jsonl", "--data.lang=[]"], "corral evaluate trees does not read data.lang"),
        (["trees"], "--output"),
        (["nothing"], "nothing: no such recipe"),
    ],
)
def test_bad_input(refused: Callable[..., str], words: list[str], part: str) -> None:
    error = refused(*words)
    assert part in error, error


def test_name_of_a_report() -> None:
    assert default_name("2026-01-02T03:04:05", "runs/demo/sft/model", None) == "2026-01-02_runs_demo_sft_model_sampling_default.json"
    assert default_name("2026-01-02T03:04:05", "a/b-1.5", Path("x/hot.json")) == "2026-01-02_a_b-1_5_sampling_hot.json"
