"""Extraction counts on a hand-counted fixture and on real trees; malformed rows; sources; the split."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from app.config.data import DataConfig, EmbeddedTaskConfig
from app.data.corpus import Corpus, load_corpus, require_groups, require_prompts, require_threads
from app.errors import DataError

ROOT = Path(__file__).parents[3]
SMALL = ROOT / "tests" / "fixtures" / "oasst_small.jsonl"
REAL = Path(os.environ.get("CORRAL_OASST_DATA") or ROOT.parent / "shared" / "data")


def load(path: Path | str, folder: Path, **settings: Any) -> Corpus:
    return load_corpus(DataConfig(path=str(path), **settings), seed=1, folder=folder)


# Counted by hand, tree by tree, as messages / threads / groups (pairs) / prompts:
#   T1  11 / 5 / 2 (3 + 1) / 5   a trailing user turn is dropped, only the first of two trailing ones counts; T1-a3 is unranked
#   T2   6 / 1 / 0         / 1   one reply left: the others are deleted, synthetic, rejected in review; nothing below a deleted one
#   T3   4 / 1 / 0         / 2   one reply each, the first unranked
#   T4   3 / German            T5   3 / synthetic            T6   3 / still growing            T8   2 / root not reviewed
#   T7   1 / 0 / 0         / 1   waits in the prompt lottery
#   T9   4 / 3 / 1 (1)     / 1   two replies share rank 1: one of them is left out of the group
SMALL_COUNTS = {"trees": 9, "messages": 37, "threads": 10, "groups": 3, "pairs": 5, "prompts": 10}


def test_small_fixture_counts(tmp_path: Path) -> None:
    corpus = load(SMALL, tmp_path)
    assert corpus.counts == SMALL_COUNTS
    assert corpus.format == "oasst"
    assert corpus.quarantined == 0
    assert not (tmp_path / "quarantine.jsonl").exists()


@pytest.mark.parametrize(("top_k", "threads"), [(1, 4), (2, 8), (3, 9)])
def test_small_fixture_top_k(tmp_path: Path, top_k: int, threads: int) -> None:
    assert load(SMALL, tmp_path, top_k=top_k).counts == SMALL_COUNTS | {"threads": threads}


def test_every_language_is_kept_when_none_is_named(tmp_path: Path) -> None:
    assert load(SMALL, tmp_path, lang=()).counts == SMALL_COUNTS | {"threads": 12, "groups": 4, "pairs": 6, "prompts": 11}


def test_replies_are_best_first(tmp_path: Path) -> None:
    corpus = load(SMALL, tmp_path)
    groups = {group.id: group for group in (*corpus.train.groups, *corpus.validation.groups)}
    assert groups["T1-a0-u0"].replies == ("Six minutes are enough.", "Boil it less.")
    assert [message.role for message in groups["T1-a0-u0"].prefix] == ["user", "assistant", "user"]
    assert groups["T9"].replies == ("Jupiter.", "Saturn, I think.")


@pytest.mark.skipif(not (REAL / "en_100_tree.jsonl").is_file(), reason="no real OASST trees here")
@pytest.mark.parametrize(("top_k", "threads"), [(None, 538), (1, 98), (2, 276), (3, 467)])
def test_real_trees(tmp_path: Path, top_k: int | None, threads: int) -> None:
    corpus = load(REAL / "en_100_tree.jsonl", tmp_path, top_k=top_k)
    assert corpus.counts == {"trees": 100, "messages": 1167, "threads": threads, "groups": 207, "pairs": 732, "prompts": 475}


@pytest.mark.skipif(not (REAL / "prompt_lottery_en_250_text.jsonl").is_file(), reason="no real prompts here")
def test_real_prompts(tmp_path: Path) -> None:
    corpus = load(REAL / "prompt_lottery_en_250_text.jsonl", tmp_path)
    assert corpus.format == "prompts"
    assert (len(corpus.train.prompts), len(corpus.validation.prompts)) == (200, 50)
    require_prompts(corpus)
    with pytest.raises(DataError, match=r"prompts format.*SFT needs one"):
        require_threads(corpus)


def flatten(node: dict[str, Any], tree: dict[str, Any]) -> list[dict[str, Any]]:
    row = {key: value for key, value in node.items() if key != "replies"}
    row |= {"message_tree_id": tree["message_tree_id"], "tree_state": tree["tree_state"], "parent_id": node.get("parent_id")}
    below = [{**reply, "parent_id": node["message_id"]} for reply in node["replies"]]
    return [row, *(message for reply in below for message in flatten(reply, tree))]


def test_flat_messages_give_the_same_corpus(tmp_path: Path) -> None:
    trees = [json.loads(line) for line in SMALL.read_text().splitlines()]
    flat = tmp_path / "flat.jsonl"
    flat.write_text("".join(json.dumps(row) + "\n" for tree in trees for row in flatten(tree["prompt"], tree)))
    nested, joined = load(SMALL, tmp_path), load(flat, tmp_path)
    assert (joined.train, joined.validation, joined.counts) == (nested.train, nested.validation, nested.counts)


def test_flat_message_without_its_parent_is_set_aside(tmp_path: Path) -> None:
    flat = tmp_path / "flat.jsonl"
    rows = [
        {"message_id": "a", "parent_id": None, "role": "prompter", "text": "Hello?", "lang": "en", "review_result": True},
        {"message_id": "c", "parent_id": "b", "role": "prompter", "text": "Lost.", "lang": "en"},
    ]
    flat.write_text("\n".join(map(json.dumps, rows)))
    assert load(flat, tmp_path).quarantined == 1
    assert "its parent 'b'" in (tmp_path / "quarantine.jsonl").read_text()


def broken_file(tmp_path: Path) -> Path:
    good = SMALL.read_text().splitlines()
    nameless = json.dumps({"message_tree_id": "X", "tree_state": "ready_for_export", "prompt": {"role": "prompter", "text": "?"}})
    wrong_role = json.dumps({"message_tree_id": "Y", "prompt": {"message_id": "Y", "role": "assistant", "text": "?"}})
    file = tmp_path / "broken.jsonl"
    lines = [good[0], '{"message_tree_id": ', "", nameless, good[1], wrong_role, good[0], '"a string"', "[" * 100_000]
    file.write_bytes("\n".join(lines).encode() + b'\n"\xff"\n')
    return file


def test_malformed_rows_are_set_aside_with_line_and_reason(tmp_path: Path) -> None:
    file = broken_file(tmp_path)
    corpus = load(file, tmp_path / "run")
    assert corpus.counts["trees"] == 2
    rows = [json.loads(line) for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert corpus.quarantined == len(rows) == 7
    assert {row["line"]: row["reason"] for row in rows} == {
        2: "malformed JSON: Expecting value at column 20",
        4: "a message has no `message_id`",
        6: "message Y: role assistant where roles must alternate, starting with prompter",
        7: "tree T1 was already read",
        8: "neither a message tree nor a message of the OASST export format",
        9: "malformed JSON: nested too deeply",
        10: "not UTF-8 (byte 1 is 0xff, as in a Latin-1 or Windows-1252 file)",
    }
    assert rows[0]["text"] == '{"message_tree_id":'
    assert rows[0]["file"] == str(file)
    load(SMALL, tmp_path / "run")
    assert not (tmp_path / "run" / "quarantine.jsonl").exists()


def test_strict_stops_at_the_first_malformed_row(tmp_path: Path) -> None:
    file = broken_file(tmp_path)
    with pytest.raises(DataError, match=rf"{file}:2: malformed JSON.*data\.strict"):
        load(file, tmp_path, strict=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no rows"),
        ("{]\n", r":1: malformed JSON.*no other line"),
        ('{"a": 1}\n', "no known format"),
        ('{"data": [1], "more": 2}\n', "no known format .* in a row of data, more"),
        ('""\n', "none of 1 rows can be used"),
        ('[{"prompt": "a"}, {"prompt": "b"}]\n', ":1: it is one JSON array: write one object a line"),
        ('[\n{"prompt": "a"},\n{"prompt": "b"}\n]\n', "it is one JSON array: write one object a line"),
        ('[{"prompt": "a"},\n{"prompt": "b"}]\n', "it is one JSON array: write one object a line"),
        ('{\n  "prompt": "a"\n}\n', "no other line is JSON either; it is one JSON document over several lines"),
        ("Some words\nand more\n", "no other line is JSON either; it is plain text: write one JSON object a line"),
    ],
)
def test_unusable_files(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(content)
    with pytest.raises(DataError, match=message):
        load(file, tmp_path)


@pytest.mark.parametrize("data_format", ["auto", "prompts"])
@pytest.mark.parametrize(("name", "kind"), [("rows.csv", "a CSV"), ("rows.TSV", "a TSV"), ("rows.csv.gz", "a CSV")])
def test_a_table_is_named_as_what_it_is(tmp_path: Path, name: str, kind: str, data_format: str) -> None:
    file = tmp_path / name
    text = b"prompt,response\nWhy?,Because.\n"
    file.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    with pytest.raises(DataError, match=f"it is {kind}: write one JSON object a line"):
        load(file, tmp_path, format=data_format)


def test_sources_agree(tmp_path: Path) -> None:
    lines = SMALL.read_text().splitlines(keepends=True)
    folder = tmp_path / "parts"
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(lines[:4]))
    with gzip.open(folder / "b.jsonl.gz", "wt") as stream:
        stream.writelines(lines[4:])
    (folder / "notes.txt").write_text("not data")
    whole = load(SMALL, tmp_path)
    for path in (folder, folder / "*.jsonl*", f"file://{SMALL}"):
        corpus = load(path, tmp_path)
        assert (corpus.train, corpus.validation) == (whole.train, whole.validation)
        assert (corpus.counts, corpus.sha256) == (whole.counts, whole.sha256)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing.jsonl", "no such file"),
        ("missing/trees.jsonl", "no such file"),
        ("*.nothing", "no such file"),
        ("file:///missing/trees.jsonl", "cannot be read"),
        ("nosuch://bucket/trees.jsonl", "cannot be read"),
    ],
)
def test_missing_sources(tmp_path: Path, path: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(path, tmp_path)


def test_empty_folder_and_damaged_archive(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no file"):
        load(tmp_path / "empty", tmp_path)
    damaged = tmp_path / "damaged.jsonl.gz"
    with gzip.open(damaged, "wb") as stream, SMALL.open("rb") as source:
        shutil.copyfileobj(source, stream)
    damaged.write_bytes(damaged.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"damaged\.jsonl\.gz: cannot be read"):
        load(damaged, tmp_path)


def test_no_ranked_groups_is_an_error_for_a_reward_model(tmp_path: Path) -> None:
    file = tmp_path / "one_reply.jsonl"
    lines = SMALL.read_text().splitlines()
    file.write_text("\n".join(lines[1:3]))
    corpus = load(file, tmp_path, val_split=0.5)
    require_threads(corpus)
    require_prompts(corpus)
    with pytest.raises(DataError, match=r"one_reply\.jsonl.*two or more ranked replies.*a reward model needs one"):
        require_groups(corpus)


def test_split_is_by_tree_and_ignores_row_order(tmp_path: Path) -> None:
    config = DataConfig(embedded=EmbeddedTaskConfig(trees=200), val_split=0.2)
    corpus = load_corpus(config, seed=3, folder=tmp_path)
    train = {thread.tree_id for thread in corpus.train.threads}
    validation = {thread.tree_id for thread in corpus.validation.threads}
    assert (len(train), len(validation)) == (160, 40)
    assert not train & validation
    assert {group.tree_id for group in corpus.validation.groups} == {prompt.tree_id for prompt in corpus.validation.prompts} == validation
    openings = [{prompt.messages[0].content for prompt in split.prompts} for split in (corpus.train, corpus.validation)]
    assert not openings[0] & openings[1]

    backwards = tmp_path / "backwards.jsonl"
    backwards.write_text("".join(reversed(Path(corpus.path).read_text().splitlines(keepends=True))))
    again = load_corpus(DataConfig(path=str(backwards)), seed=3, folder=tmp_path)
    assert {thread.tree_id for thread in again.validation.threads} == validation
    other = load_corpus(config.model_copy(update={"path": str(corpus.path)}), seed=4, folder=tmp_path)
    assert {thread.tree_id for thread in other.validation.threads} != validation


def test_parquet_rows_are_read_like_lines(tmp_path: Path) -> None:
    rows = [{"prompt": f"Question {k}?", "chosen": "yes", "rejected": "no"} for k in range(12)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines, table = (
        load_corpus(DataConfig(path=str(tmp_path / f"pairs.{kind}")), seed=1, folder=tmp_path / kind) for kind in ("jsonl", "parquet")
    )
    assert (table.train, table.validation, table.counts) == (lines.train, lines.validation, lines.counts)
    assert table.counts["pairs"] == 12
    (tmp_path / "pairs.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(DataError, match=r"pairs\.parquet: cannot be read"):
        load_corpus(DataConfig(path=str(tmp_path / "pairs.parquet")), seed=1, folder=tmp_path)


def test_a_question_is_asked_once_whatever_its_answers(tmp_path: Path) -> None:
    """Rows with the same question and different answers are several threads, one prompt, and its first answer is the reference."""
    rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in ("1a", "1b", "2c")]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = load(file, tmp_path / "out")
    prompts = [*corpus.train.prompts, *corpus.validation.prompts]
    assert sorted((prompt.messages[0].content, prompt.reference) for prompt in prompts) == [("1", "a"), ("2", "c")]
    assert corpus.counts["threads"] == 3
