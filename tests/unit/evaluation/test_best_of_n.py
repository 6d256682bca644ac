"""Means per sampling configuration, and the division into selected and rejected answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from app.config.data import DataConfig
from app.data.corpus import load_corpus
from app.evaluation.best_of_n import best_of_n, comparison, write_choices
from app.evaluation.reply_scores import score_report, score_summary
from tests.unit.evaluation.reports import CountScorer, report

REPORT = report(
    {
        "Why?": {"k50": ["++", "+", ""], "greedy": ["++++"], "nucleus9": ["+++", "+++++", "+"]},
        "How? +": {"k50": ["+"], "greedy": [""]},
        "When?": {"k50": [], "greedy": []},
    }
)


def test_means_weigh_every_output_the_same() -> None:
    scores = score_report(REPORT, CountScorer())
    assert scores == pytest.approx({"k50": (2 + 1 + 0 + 0) / 4, "greedy": (4 - 1) / 2, "nucleus9": 3.0, "mean_reward": 15 / 9})
    assert list(scores)[-1] == "mean_reward"
    assert score_summary(REPORT, CountScorer(), reward_model="rm") == {
        "model_name": "runs/sft/model",
        "results": scores,
        "reward_model": "rm",
    }


def test_all_outputs_of_a_prompt_compete() -> None:
    scorer = CountScorer()
    first, second = best_of_n(REPORT, scorer, keep=3)
    assert scorer.scored == 9, "more than five, and none left out"
    assert first.selected == (("+++++", 5.0), ("++++", 4.0), ("+++", 3.0))
    assert first.rejected == (("++", 2.0), ("+", 1.0), ("+", 1.0), ("", 0.0))
    assert (second.selected, second.rejected) == ((("+", 0.0), ("", -1.0)), ())


def test_files_hold_numbers_and_train(tmp_path: Path) -> None:
    choices = best_of_n(REPORT, CountScorer(), keep=1)
    files = {file.name: file for file in write_choices(choices, tmp_path / "best")}
    selected = json.loads(files["selected_samples.json"].read_text())
    assert selected[0] == {"prompt": "Why?", "outputs": [["+++++", 5.0]]}
    rejected = json.loads(files["rejected_samples.json"].read_text())
    assert [len(row["outputs"]) for row in rejected] == [6, 1]
    assert json.loads(files["comparison.json"].read_text()) == {
        "rejected_samples": {"mean": pytest.approx(10 / 7), "min": -1.0, "max": 4.0, "count": 7},
        "selected_samples": {"mean": 2.5, "min": 0.0, "max": 5.0, "count": 2},
    }
    corpus = load_corpus(DataConfig(path=str(files["selected.jsonl"])), seed=0, folder=tmp_path, split=False)
    assert corpus.quarantined == 0
    assert [[message.content for message in thread.messages] for thread in corpus.train.threads] == [["Why?", "+++++"], ["How? +", "+"]]


def test_rows_to_train_on_are_distinct_and_say_something(tmp_path: Path) -> None:
    choices = best_of_n(report({"Why?": {"k50": ["+", "+", " "]}}), CountScorer(), keep=3)
    *_, rows = write_choices(choices, tmp_path)
    assert len(rows.read_text().splitlines()) == 1
    assert comparison(choices)["rejected_samples"] == {"mean": None, "min": None, "max": None, "count": 0}
