"""The tools around SFT and reward models, one after another: a real engine samples, a real reward model scores."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from app.config.data import DataConfig
from app.data.corpus import Corpus, load_corpus
from jobs.main import main
from tests.e2e.command import RUN_SECONDS, start
from tests.tiny_models import CONTEXT, make_neox, make_reward_model
from tests.waiting import wait_until

CONFIG = {
    "default": {"generate_args": {"max_new_tokens": 10, "min_new_tokens": 3}},
    "configurations": [
        {"name": "k50", "generate_args": {"top_k": 50, "top_p": 0.95, "repetition_penalty": 1.2}},
        {"name": "narrow", "generate_args": {"top_k": 1}},
        {"name": "magic_numbers", "generate_args": {"top_k": 9607, "top_p": 0.242}},
        {"name": "greedy", "generate_args": {"do_sample": False, "num_beams": 1}},
    ],
}
LENGTH = f"--data.max_length={CONTEXT}"


def read(file: Path) -> Any:
    return json.loads(file.read_text())


def corpus(file: Path) -> Corpus:
    return load_corpus(DataConfig(path=str(file)), seed=0, folder=file.parent, split=False)


def test_from_prompts_to_new_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    model = make_neox(tmp_path / "lm")
    reward = make_reward_model(tmp_path / "rm", model, reward_offset=0.5)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(f"Question {k}?") + "\n" for k in range(6)))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))

    def evaluate(action: str, *words: str, **options: object) -> None:
        given = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        assert main(["evaluate", action, *words, *given]) == 0, capsys.readouterr().err

    report = str(tmp_path / "report.json")
    files = {"prompts": tmp_path / "prompts.jsonl", "config": tmp_path / "config.json", "report": report}
    evaluate("samples", "-n", "5", "--rollout.kv_cache_gib=0.1", model=model, num_samples=3, **files)
    check_report(read(tmp_path / "report.json"), model)

    evaluate("score", report, LENGTH, model=reward)
    scores = read(tmp_path / "report.scores.json")
    assert (scores["model_name"], scores["reward_model"]) == (model, reward)
    means = scores["results"]
    assert list(means) == ["k50", "narrow", "magic_numbers", "greedy", "mean_reward"]
    assert means["mean_reward"] == pytest.approx((3 * (means["k50"] + means["narrow"] + means["magic_numbers"]) + means["greedy"]) / 10)
    assert means["narrow"] == pytest.approx(means["greedy"], abs=1e-5), "the likeliest token is the likeliest token"
    assert "mean_reward" in capsys.readouterr().out

    evaluate("best-of-n", report, LENGTH, model=reward, keep=2, output=tmp_path / "best")
    ranked = check_best_of_n(tmp_path / "best", means["mean_reward"])

    evaluate("trees", report, report, output=tmp_path / "trees.jsonl")
    trees = corpus(tmp_path / "trees.jsonl")
    assert (trees.counts["trees"], trees.counts["threads"], trees.quarantined) == (5, 0, 0)

    file = tmp_path / "ranked.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ranked))
    evaluate("rm", str(file), LENGTH, model=reward, json=tmp_path / "rm.json")
    results = read(tmp_path / "rm.json")
    assert (results["model"], results["dataset"], results["groups"]) == (reward, str(file), len(ranked))
    assert results["pair_accuracy"] == 1.0, "it agrees with its own ranking"
    assert 0 <= results["length_baseline"] < 1
    assert results["length_baseline_rule"] == "the longer reply wins"
    assert "pair_accuracy" in capsys.readouterr().out


def check_report(report: dict[str, Any], model: str) -> None:
    assert report.keys() == {"model_name", "date", "args", "prompts"}
    assert (report["model_name"], report["args"]["seed"], report["args"]["num_samples"]) == (model, 42, 3)
    assert [row["prompt"] for row in report["prompts"]] == [f"Question {k}?" for k in range(5)]
    for row in report["prompts"]:
        results = {result["sampling_config"]: result for result in row["results"]}
        assert {name: len(result["outputs"]) for name, result in results.items()} == {
            "k50": 3,
            "narrow": 3,
            "magic_numbers": 3,
            "greedy": 1,
        }
        assert results["k50"]["sampling_params"]["repetition_penalty"] == 1.2
        assert set(results["narrow"]["outputs"]) == set(results["greedy"]["outputs"])
        assert len(set(results["k50"]["outputs"])) == 3


def check_best_of_n(folder: Path, mean_reward: float) -> list[dict[str, Any]]:
    """Returns the distinct answers to each prompt, best first, as a ranked set."""
    selected, rejected = read(folder / "selected_samples.json"), read(folder / "rejected_samples.json")
    comparison = read(folder / "comparison.json")
    rows = []
    for best, rest in zip(selected, rejected, strict=True):
        scores = [score for _, score in [*best["outputs"], *rest["outputs"]]]
        assert (len(best["outputs"]), len(scores)) == (2, 10)
        assert scores == sorted(scores, reverse=True)
        by_score = {round(score, 4): text for text, score in [*best["outputs"], *rest["outputs"]] if text}
        rows.append({"prompt": best["prompt"], "responses": list(dict.fromkeys(by_score.values()))})
    overall = sum(part["mean"] * part["count"] for part in comparison.values()) / 50
    assert overall == pytest.approx(mean_reward, abs=1e-5)
    assert comparison["selected_samples"]["mean"] > comparison["rejected_samples"]["mean"]
    threads = corpus(folder / "selected.jsonl").train.threads
    texts = {(row["prompt"], text) for row in selected for text, _ in row["outputs"] if text}
    assert {(thread.messages[0].content, thread.messages[1].content) for thread in threads} == texts
    return rows


def test_scoring_goes_on_where_it_was_killed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_neox(tmp_path / "lm")
    models = [f"--model=rm={make_reward_model(tmp_path / 'rm', model)}", f"--model=ref={model}"]
    source, output, parts = tmp_path / "answers.jsonl", tmp_path / "scores.parquet", tmp_path / "scores.parquet.parts"
    source.write_text("".join(json.dumps({"instruction": f"q{k}", "response": "so " * (k % 30) + "yes"}) + "\n" for k in range(900)))
    command = ["score", str(source), *models, LENGTH, "--part-rows=10", "--json"]
    process = start([*command, f"--output={output}"], tmp_path / "log")
    first = "0-*.parquet"
    wait_until(
        lambda: len(list(parts.glob(first))) >= 20, "20 parts", seconds=RUN_SECONDS, pause=0.01, process=process, log=tmp_path / "log"
    )
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not output.exists()
    assert 20 <= len(list(parts.glob("[01]-*.parquet"))) < 180

    capsys.readouterr()
    summaries = []
    for file in (output, tmp_path / "straight.parquet"):
        assert main([*command, f"--output={file}"]) == 0
        summaries.append(json.loads(capsys.readouterr().out))
    assert output.read_bytes() == (tmp_path / "straight.parquet").read_bytes()
    assert summaries[0].pop("output") == str(output) and summaries[1].pop("output")
    assert summaries[0] == summaries[1]
    assert (summaries[0]["replies"], set(summaries[0]["models"])) == (900, {"rm", "ref"})
    assert not parts.exists()
