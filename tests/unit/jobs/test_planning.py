"""`corral plan`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.main import main

ROOT = Path(__file__).resolve().parents[3]
RECIPES = ROOT / "jobs" / "recipes"
PPO_12B = str(RECIPES / "pythia" / "ppo-12b.toml")


def planned(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = main(["plan", *words])
    return code, capsys.readouterr().out


def test_json_of_a_recipe_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = planned([PPO_12B, "--cluster", "1x8xA100-80GB", "--json"], capsys)
    document = json.loads(out)
    assert code == 0 and document["fits"] and document["command"] == "ppo"
    assert set(document["bytes"]) == {"learner", "engine", "reward", "reference"}
    assert document["seconds_per_step"] > 0 and document["cost"] > document["cost_per_step"] > 0


def test_what_does_not_fit_exits_with_1_and_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = planned([PPO_12B, "--cluster=1x8xA100-40GB"], capsys)
    assert code == 1
    assert "DOES NOT FIT" in out and "short: stage ppo: engine needs" in out and "GPU 5 would hold" in out


def test_text_groups_devices_and_gives_time_and_cost(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = planned([PPO_12B, "--cluster", "1x8xA100-80GB"], capsys)
    assert code == 0
    for part in ("node 0 GPU 0 (and 5 like it)", "s a step", "156 steps", "in all:", "27.45 USD an hour, list prices of 2025-12-21"):
        assert part in out


def test_a_search_says_that_its_time_is_a_bound(capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        PPO_12B,
        "--for=tune",
        "--cluster=1x8xA100-80GB",
        "--ppo.workers.count=4",
        "--rollout.engines.count=2",
        "--rollout.colocate=false",
    ]
    _, out = planned([*words, "--tune.trials=3", "--tune.concurrent=1"], capsys)
    for part in (
        "156 steps a trial, 3 trials, 1 at a time",
        "in all: at most ",
        "with every trial to its last step; schedulers stop some before",
    ):
        assert part in out
    hours = [json.loads(planned([*words, "--json", f"--tune.trials={n}", "--tune.concurrent=1"], capsys)[1])["seconds"] for n in (1, 400)]
    assert hours[1] == pytest.approx(400 * hours[0])


def test_overrides_price_rows_and_length(capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(RECIPES / "pythia" / "sft-12b.toml"), "--cluster", "1x8xA100-80GB", "--json"]
    document = json.loads(planned([*words, "--price", "10", "--rows", "6400", "--sft.epochs=1", "--mean-length", "512"], capsys)[1])
    assert document["price_per_hour"] == 10 and document["prices_read"] is None
    assert document["stages"][0]["steps"] == 100
    assert document["seconds_per_step"] < json.loads(planned(words, capsys)[1])["seconds_per_step"] / 3


def test_this_machine_and_the_command_from_the_name(capsys: pytest.CaptureFixture[str]) -> None:
    _, out = planned([str(RECIPES / "tiny" / "pipeline.toml")], capsys)
    assert out.startswith("corral pipeline on local") and "stage rm" in out and "USD" not in out
    _, out = planned([str(RECIPES / "tiny" / "pipeline.toml"), "--for", "serve"], capsys)
    assert out.startswith("corral serve on local") and "takes no steps" in out


def test_what_a_plan_assumes_is_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--cluster", "1x8xA100-80GB", '--ppo.lora.targets=["query_key_value", "q_proj"]']
    code, out = planned([PPO_12B, *words], capsys)
    assert code == 0 and "\nassumed: ppo.lora.targets: no linear layer called q_proj" in out
    code, out = planned([PPO_12B, "--cluster", "1x4xA100-80GB"], capsys)
    assert code == 1 and "in all" not in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cluster", "8xA100"], "NODES x GPUS x KIND"),
        (["--cluster", "missing.yaml"], "missing.yaml"),
        (["--for", "chat"], "--for chat"),
        (["--ppo.kl.coff=1"], "ppo.kl.coff"),
    ],
)
def test_bad_input_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", PPO_12B, *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.path=my-org/my-model"], "model.path = my-org/my-model: its size is unknown"),
        (["--model.path=./nowhere"], "model.path = ./nowhere: its size is unknown"),
        (["--reward.path=judge"], "reward.path = judge: its size is unknown"),
        (["--reward.parts.own.type=reward_model", '--reward.parts.own.paths=["judge"]'], "reward.parts = judge: its size is unknown"),
        (["--rows", "0"], "--rows 0: give 1 or more"),
        (["--mean-length", "-5"], "--mean-length -5: give 1 or more"),
        (["--price", "-3"], "--price -3: give 0 or more"),
        (["--price", "nan"], "--price nan: give 0 or more"),
        (["--price", "inf"], "--price inf: give 0 or more"),
    ],
)
def test_what_would_make_a_plan_meaningless_is_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "jobs/recipes/tiny/ppo.toml", "--cluster", "1x1xA100-80GB", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_cluster_larger_than_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    """A plan looks at every node: a number with too many digits would keep it busy for hours."""
    assert main(["plan", str(RECIPES / "tiny" / "pipeline.toml"), "--cluster", "99999999x8xA100-80GB"]) == 2
    assert "--cluster 99999999x8xA100-80GB: plans are for at most" in capsys.readouterr().err
