"""What `corral data inspect` finds, and what it prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from app.config.data import DataConfig
from app.data.corpus import load_corpus, require_threads
from app.data.inspection import histogram, inspect_corpus, percentiles
from app.data.templates import build_template
from app.errors import DataError
from jobs.main import main
from tests.tiny_models import make_neox, make_tokenizer


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    rows = [chat(f"Question {k}?", "yes " * k + "end") for k in range(20)]
    lines = [json.dumps(row) for row in [*rows, chat("Question 3?", "another"), chat("", "x"), chat(" ", "y")]]
    file = tmp_path / "chats.jsonl"
    file.write_text("\n".join([*lines, "{broken"]) + "\n")
    return file


def test_findings(source: Path, tmp_path: Path) -> None:
    corpus = load_corpus(DataConfig(path=str(source)), seed=1, folder=tmp_path / "data")
    found = inspect_corpus(corpus, tmp_path / "data", build_template("auto", make_tokenizer()), max_length=40)
    facts = found.as_dict()
    assert (facts["format"], facts["rows"], facts["trees"], facts["sft_threads"], facts["rl_prompts"]) == ("messages", 24, 20, 21, 20)
    assert facts["quarantined"] == 3
    assert sorted(facts["quarantine_reasons"].values()) == [1, 2]  # two rows with the same fault are one reason
    assert (facts["duplicates"], facts["leakage"], facts["round_trip_failures"]) == (0, 0, 0)
    assert facts["length_unit"] == "tokens"
    assert facts["truncated"] == sum(length > 40 for length in found.lengths) > 0
    assert found.longest[0] == (max(found.lengths), "Question 19?")


def test_a_conversation_on_both_sides_is_leakage(tmp_path: Path) -> None:
    """Two trees that begin alike are two trees to the split: the inspection says so."""

    def tree(name: str) -> dict[str, Any]:
        labels = {"quality": {"value": int(name[1:]) / 10, "count": 3}}  # the same words, differently judged
        answer = {"message_id": name + "a", "role": "assistant", "text": "Because.", "labels": labels, "replies": []}
        root = {"message_id": name, "role": "prompter", "text": "Why?", "lang": "en", "review_result": True, "replies": [answer]}
        return {"message_tree_id": name, "tree_state": "ready_for_export", "prompt": root}

    file = tmp_path / "trees.jsonl"
    file.write_text("\n".join(json.dumps(tree(f"t{k}")) for k in range(8)) + "\n")
    found = inspect_corpus(load_corpus(DataConfig(path=str(file)), seed=1, folder=tmp_path), tmp_path)
    assert (found.leakage, found.duplicates, found.languages) == (1, 7, {"en": 8})


def trees(*languages: str | None) -> str:
    """A tree with an answer in each of the languages, as lines."""

    def row(name: str, lang: str | None) -> dict[str, Any]:
        answer = {"message_id": f"{name}a", "role": "assistant", "text": f"Answer {name}.", "replies": []}
        root = {"message_id": name, "role": "prompter", "text": f"{name}?", "lang": lang, "review_result": True, "replies": [answer]}
        return {"message_tree_id": name, "tree_state": "ready_for_export", "prompt": root}

    return "".join(json.dumps(row(f"t{number}", lang)) + "\n" for number, lang in enumerate(languages))


@pytest.mark.parametrize(
    ("languages", "options", "told"),
    [
        (["de"] * 5, {}, ["""5 trees left out by data.lang = ["en"]: --data.lang='["de"]' keeps them"""]),
        (["en", "en", "de"], {}, ["""1 tree left out by data.lang = ["en"]: --data.lang='["en", "de"]' keeps them"""]),
        (["en", "en", None], {}, ["""1 tree left out by data.lang = ["en"]: --data.lang='[]' keeps them"""]),
        (["en", "de"], {"lang": []}, []),
        (["en", "en"], {}, []),
    ],
)
def test_trees_in_other_languages_are_told_with_the_option_that_keeps_them(
    tmp_path: Path, languages: list[str | None], options: dict[str, Any], told: list[str]
) -> None:
    file = tmp_path / "trees.jsonl"
    file.write_text(trees(*languages))
    corpus = load_corpus(DataConfig.model_validate({"path": str(file), **options}), seed=1, folder=tmp_path)
    assert inspect_corpus(corpus, tmp_path).as_dict()["left_out"] == told
    if languages == ["de"] * 5:
        with pytest.raises(DataError, match="no conversation that ends in an assistant turn") as caught:
            require_threads(corpus)
        assert told[0] in str(caught.value)


def test_command_tells_the_languages_that_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, page = tmp_path / "trees.jsonl", tmp_path / "page.html"
    file.write_text(trees(*["de"] * 5))
    assert main(["data", "inspect", str(file), f"--plot={page}"]) == 0
    assert """5 trees left out by data.lang = ["en"]: --data.lang='["de"]' keeps them""" in capsys.readouterr().out
    assert "5 trees left out" in page.read_text()
    assert main(["data", "inspect", str(file), "--json", "--data.lang=de"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["sft_threads"], facts["left_out"]) == (5, [])


def test_rows_that_cannot_be_used_are_kept_where_none_can(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, kept = tmp_path / "chats.jsonl", tmp_path / "new" / "bad.jsonl"
    file.write_text("".join(json.dumps(chat("", "x")) + "\n" for _ in range(3)))
    assert main(["data", "inspect", str(file), f"--quarantine={kept}"]) == 2
    error = capsys.readouterr().err
    assert "none of 3 rows can be used" in error and f"`corral data inspect {file} --quarantine FILE` keeps them all" in error
    assert [json.loads(line)["line"] for line in kept.read_text().splitlines()] == [1, 2, 3]


@pytest.mark.parametrize("option", ["--quarantine", "--plot"])
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_read(
    source: Path, tmp_path: Path, option: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.data.corpus.load_corpus", lambda *_, **__: pytest.fail("the source was read"))
    assert main(["data", "inspect", str(source), f"{option}={source}/lengths.png"]) == 2
    assert "its folder cannot be made" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("--data.path=other.jsonl", "was given data.path beside the argument that stands for it"),
        ("--ppo.steps=3", "corral data does not read ppo.steps"),
    ],
)
def test_options_that_it_does_not_read(source: Path, option: str, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "inspect", str(source), option]) == 2
    assert reason in capsys.readouterr().err


def test_help_lists_the_keys_of_data(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["data", "--help"])
    text = capsys.readouterr().out
    assert "--data.format" in text and "--data.lang" in text and "--run.seed" in text and "--ppo." not in text


def test_raw_text(tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": "word " * k + "<|endoftext|>"}) + "\n" for k in range(1, 9)))
    corpus = load_corpus(DataConfig(path=str(file)), seed=1, folder=tmp_path)
    facts = inspect_corpus(corpus, tmp_path, build_template("auto", make_tokenizer()), max_length=30).as_dict()
    assert (facts["format"], facts["sft_threads"], facts["rl_prompts"], facts["leakage"]) == ("text", 8, 0, 0)
    assert facts["length_percentiles"]["min"] == 5 + 13 + 1  # a token a byte, and the end
    assert facts["round_trip_failures"] == 0


def test_lengths() -> None:
    assert percentiles(range(101)) == {"min": 0, "p50": 50, "p90": 90, "p99": 99, "max": 100}
    assert percentiles([]) == {} and histogram([]) == []
    bins = histogram([1, 1, 2, 30], bins=3)
    assert bins[0][0] == 1 and bins[-1][1] > 30
    assert sum(count for _, _, count in bins) == 4


def test_command(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept, picture = tmp_path / "bad.jsonl", tmp_path / "lengths.png"
    model = make_neox(tmp_path / "model")
    options = [f"--quarantine={kept}", f"--plot={picture}", f"--tokenizer={model}"]
    capsys.readouterr()
    assert main(["data", "inspect", str(source), "--json", *options]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["sft_threads"], facts["rm_groups"], facts["quarantined"]) == (21, 0, 3)
    assert [json.loads(line)["line"] for line in kept.read_text().splitlines()] == [22, 23, 24]
    assert picture.read_bytes().startswith(b"\x89PNG")
    page = tmp_path / "findings.html"
    assert main(["data", "inspect", str(source), f"--plot={page}"]) == 0
    written = page.read_text()
    assert "<svg" in written and "Question 19?" in written and "`messages[1]` is empty" not in written and "is empty" in written
    assert "http" not in written.replace("http://www.w3.org", "")
    assert main(["data", "inspect", str(source), "--plot=lengths.pdf"]) == 2
    assert "lengths.pdf: give a file that ends in .png, .svg, .html" in capsys.readouterr().err
    assert main(["data", "inspect", str(source), "--data.strict=true"]) == 2
    assert "chats.jsonl:22: `messages[1]` is empty" in capsys.readouterr().err
    assert main(["data", "inspect", str(source)]) == 0
    assert "sft_threads" in capsys.readouterr().out
    assert main(["data", "inspect", str(tmp_path / "nowhere.jsonl")]) == 2
