"""The report: complete, self-contained, and safe whatever the answers hold."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from app.config.recipe import Recipe
from app.curves import Curve, draw, read_curves, running_mean
from app.display import PlainDisplay
from app.headline import cards, comparison, facts, number
from app.report import read_lines, write_report
from app.run_folder import RunFolder
from app.tracking import RunTracker


def interval(mean: float, half: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - half, "high": mean + half}


SUMMARY: dict[str, Any] = {
    "sft": {"eval_loss_before": 6.5, "eval_loss_after": 1.25},
    "rm": {"pair_accuracy": 0.912, "length_baseline": 0.531},
    "ppo": {
        "steps": 100,
        "reward_before": interval(0.0, 0.1),
        "reward_after": interval(1.4, 0.1),
        "reward_gain": interval(1.4, 0.2),
        "gold_before": interval(0.4, 0.02),
        "gold_after": interval(0.62, 0.02),
        "gold_gain": interval(0.22, 0.03),
        "win_rate": interval(0.781, 0.04),
        "win_rate_judge": "gold",
        "kl": 4.2,
        "length_before": 21.3,
        "length_after": 19.8,
        "distinct_before": 0.98,
        "distinct_after": 0.87,
        "max_logprob_mismatch": 3.1e-6,
        "tokens_per_second": 1043.2,
    },
    "peak_memory": 6 * 2**30,
    "seconds": {"sft": 62.0, "rm": 41.0, "ppo": 170.0},
}
HOSTILE = "<script>alert('x')</script><img src=https://example.org/a.png>"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("runs") / "demo"
    run = RunFolder.open(Recipe.model_validate({"run": {"dir": str(path)}}), "pipeline")
    run.record_data("ab" * 32)
    with RunTracker(path, display=PlainDisplay(io.StringIO())) as tracker:
        for step in range(1, 51):
            tracker.log("ppo", step, {"score_mean": step / 50, "grad_norm": float("nan") if step == 9 else 1.0})
        tracker.event("ppo", 9, f"alarm: entropy = 0.001 {HOSTILE}")
        tracker.log("sft", 10, {"loss": 2.0})
        tracker.log("sft", 20, {"loss": 1.0, "seconds/step": 0.5})
    sft = run.finish("sft", {}, {"data": "ab" * 32})
    run.finish("rm", {}, {"sft": sft})
    run.write_summary(SUMMARY)
    example = {"reward_before": -0.25, "reward_after": 1.5, "gold_before": 0.5, "gold_after": 0.25}
    rows = [
        {"prompt": HOSTILE, "before": HOSTILE, "after": "", **example},
        {"prompt": "p", "before": "b", "after": "a", **dict.fromkeys(example)},
    ]
    (path / "examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return write_report(path).read_text()


class Parsed(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_nothing_is_loaded_from_anywhere(page: str) -> None:
    parsed = Parsed(page)
    assert not [tag for tag, _ in parsed.tags if tag in {"script", "link", "img", "iframe", "object", "embed"}]
    for tag, attributes in parsed.tags:
        for name in ("src", "href", "xlink:href", "action"):
            target = attributes.get(name)
            assert target is None or target.startswith("#"), f"<{tag} {name}={target}>"
    assert not re.findall(r"url\((?!#)|@import", page)


def test_answers_are_shown_as_text(page: str) -> None:
    assert HOSTILE not in page
    assert HOSTILE in Parsed(page).text
    assert "(empty answer)" in page


def test_alarms_are_listed_with_their_step(page: str) -> None:
    text = Parsed(page).text
    assert "Alarms" in text
    assert "PPO, step 9" in text
    assert f"alarm: entropy = 0.001 {HOSTILE}" in text


def test_the_headline_says_it_in_words(page: str) -> None:
    text = " ".join(Parsed(page).text.split())
    for phrase in (
        "6.500 → 1.250",
        "loss on held-out conversations",
        "91.2%",
        "answer length alone gets 53.1% right",
        "78.1%",
        "judged by gold",
        "95% interval 74.1% to 82.1%",
        "+0.220 (0.190 to 0.250)",
        "−11.0 points",
        "6.00 GiB",
        "2m 50s",
    ):
        assert phrase in text


def test_scores_say_whether_they_rose(page: str) -> None:
    assert '<span class="score up">reward 1.500</span>' in page
    assert '<span class="score down">gold 0.250</span>' in page
    assert '<span class="score">reward −0.250</span>' in page


def test_curves_config_and_chain_are_there(page: str) -> None:
    assert page.count("<svg") == 3, "score_mean, grad_norm and loss; a metric logged once needs no curve"
    assert "1 value not finite" in page
    text = Parsed(page).text
    assert "ppo.kl.coef = 0.05" in text
    assert "from data abababab" in text
    assert "Reward model" in text


def test_ids_of_different_plots_do_not_collide(page: str) -> None:
    clips = [re.findall(r'<clipPath id="([^"]+)"', svg) for svg in page.split("<svg")[1:]]
    flat = [clip for found in clips for clip in found]
    assert flat
    assert len(flat) == len(set(flat))


def test_a_run_without_anything_yet_has_a_report(tmp_path: Path) -> None:
    text = write_report(tmp_path).read_text()
    assert "has not finished" in text
    assert "<svg" not in text


def test_a_summary_of_one_stage_or_with_nulls_is_enough() -> None:
    assert [card["stage"] for card in cards({"sft": {"eval_loss_after": 1.0}})] == ["Supervised fine-tuning"]
    assert comparison({"ppo": {"reward_before": 0.0, "reward_after": 0.5, "gold_before": None, "gold_after": None}})[0].change == "+0.500"
    assert facts({"ppo": {"kl": None}}) == []


def test_curves_read_resumed_and_half_written_files(tmp_path: Path) -> None:
    events = [(1, 3.0), (2, 2.0), (3, 9.0), (2, 1.5), (3, None)]
    lines = [json.dumps({"time": 0, "stage": "sft", "step": step, "metrics": {"loss": value}}) for step, value in events]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"time": 0, "stage": "s')
    curve = read_curves(tmp_path / "metrics.jsonl")["sft"]["loss"]
    assert curve.points == {1: 3.0, 2: 1.5, 3: None}
    assert (curve.last, curve.missing) == (1.5, 1)
    assert read_curves(tmp_path / "absent.jsonl") == {}


def test_a_curve_without_a_finite_value_still_draws() -> None:
    assert draw(Curve("loss", {1: None, 2: None})).startswith("<svg")


def test_running_mean_by_hand() -> None:
    nan = float("nan")
    assert running_mean([1.0, 3.0, nan, 5.0], window=3) == [2.0, 2.0, 4.0, 5.0]


@pytest.mark.parametrize(
    ("value", "options", "text"),
    [
        (None, {}, ""),
        (0.0, {}, "0"),
        (1.23456, {}, "1.235"),
        (-12.34, {}, "−12.3"),
        (1234.5, {}, "1,234"),
        (3.1e-6, {}, "3.1e-06"),
        (interval(0.781, 0.1), {"percent": True}, "78.1%"),
        (0.2, {"signed": True}, "+0.200"),
        (21.34, {"digits": 1}, "21.3"),
    ],
)
def test_numbers_for_people(value: Any, options: dict[str, Any], text: str) -> None:
    assert number(value, **options) == text


def test_answers_with_line_separators_of_other_alphabets(tmp_path: Path) -> None:
    """Models and web data hold them, and JSON leaves them in its strings; a line of the file ends with a line feed alone."""
    odd = "a\u2028b\u2029c\x85d"
    (tmp_path / "examples.jsonl").write_text(json.dumps({"prompt": odd, "before": odd, "after": odd}, ensure_ascii=False) + "\n", "utf-8")
    (tmp_path / "events.jsonl").write_text(json.dumps({"stage": "ppo", "step": 1, "text": odd}, ensure_ascii=False) + "\n{half", "utf-8")
    assert [row["after"] for row in read_lines(tmp_path / "examples.jsonl")] == [odd]
    assert [row["text"] for row in read_lines(tmp_path / "events.jsonl")] == [odd]
