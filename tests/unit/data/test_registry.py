"""The table of public sets: it agrees with the formats, the config and the documentation; rows in the shape of each ranked set."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from app.config.data import ColumnsConfig
from app.data.registry import SETS, PublicSet, lookup
from app.data.source import is_hub_name
from app.errors import DataError
from app.formats import FORMATS
from app.formats.records import Filters, Row, TreeRecords
from app.formats.screening import PHRASES

DOCUMENT = (Path(__file__).parents[3] / "docs" / "data_sets.md").read_text()


def read(name: str, value: Any) -> TreeRecords:
    (found,) = FORMATS[SETS[name].format].read([Row("f", 1, "", value)], Filters(columns=SETS[name].columns))
    assert isinstance(found, TreeRecords), found
    return found


@pytest.mark.parametrize("name", SETS)
def test_entries_are_what_the_options_take(name: str) -> None:
    entry = SETS[name]
    assert name == name.lower()
    assert is_hub_name(entry.path) or entry.path.startswith("https://")
    assert entry.format in {*FORMATS, "text"}
    assert entry.stages
    assert set(entry.phrases) <= set(PHRASES)
    named = {meaning: column for meaning, column in entry.columns.items() if meaning != "text"}
    assert ColumnsConfig(**named).named() == named


def test_the_document_lists_every_set_with_its_source_and_stages() -> None:
    rows = re.findall(r"^\| `([^`]+)` \| `([^`]+)` \| (\w+) \| ([\w, ]+) \|", DOCUMENT, re.MULTILINE)
    shown = {name: (path, entry_format, stages) for names, path, entry_format, stages in rows for name in names.split()}
    assert shown == {name: (shown_path(entry), entry.format, ", ".join(entry.stages)) for name, entry in SETS.items()}


def shown_path(entry: PublicSet) -> str:
    return entry.path.split("/")[2] if "://" in entry.path else entry.path


def test_lookup() -> None:
    assert lookup("Alpaca", "ppo") is SETS["alpaca"]
    with pytest.raises(DataError, match=r"'squad'; did you mean squad_v2"):
        lookup("squad", "sft")
    with pytest.raises(DataError, match=r"'xyzzy'; docs/data_sets\.md lists them"):
        lookup("xyzzy", "sft")
    with pytest.raises(DataError, match=r"shp is not made for ppo, only for rm"):
        lookup("shp", "ppo")


@pytest.mark.parametrize(
    ("name", "row", "prompt", "replies"),
    [
        (
            "webgpt",
            {"question": {"id": "1", "full_text": "Why?"}, "answer_0": "a", "answer_1": "b", "score_0": -1.0, "score_1": 1.0},
            "Why?",
            ("b", "a"),
        ),
        ("shp", {"history": "Why?", "human_ref_A": "a", "human_ref_B": "b", "score_A": 9, "score_B": 2, "labels": 1}, "Why?", ("a", "b")),
        ("hellaswag", {"ctx": "He sat", "endings": ["up", "down"], "label": "1"}, "Finish this text:\n\nHe sat", ("down", "up")),
        (
            "hf_summary_pairs",
            {"info": {"post": "Long."}, "summaries": [{"text": "Lo"}, {"text": "Long"}], "choice": 1},
            "Summarise this post:\n\nLong.",
            ("Long", "Lo"),
        ),
        ("anthropic_rlhf", {"chosen": "\n\nHuman: Hi\n\nAssistant: a", "rejected": "\n\nHuman: Hi\n\nAssistant: b"}, "Hi", ("a", "b")),
    ],
)
def test_ranked_sets(name: str, row: dict[str, Any], prompt: str, replies: tuple[str, ...]) -> None:
    (group,) = read(name, row).groups
    assert (group.prefix[-1].content, group.replies) == (prompt, replies)


@pytest.mark.parametrize(
    ("name", "row", "turns"),
    [
        (
            "squad_v2",
            {"context": "Rain falls.", "question": "What?", "answers": {"text": ["Rain"], "answer_start": [0]}},
            ["Rain falls.\n\nWhat?", "Rain"],
        ),
        (
            "gsm8k_hard",
            {"input": "1+1?", "code": "x = 2", "target": 2.0},
            ["1+1?\n\nAnswer with a short Python program.", "```python\nx = 2\n```\nIt gives 2.0."],
        ),
        ("scitldr", {"source": ["A.", "B."], "target": ["AB."]}, ["Summarise this paper in one sentence:\n\nA. B.", "AB."]),
        (
            "wmt2019_de-en",
            {"translation": {"de": "Warum?", "en": "Why?"}},
            ["Translate this from German into English:\n\nWarum?", "Why?"],
        ),
        ("oa_leet10k", {"INSTRUCTION": "Why?", "RESPONSE": "So.", "SOURCE": "x", "METADATA": "{}"}, ["Why?", "So."]),
        ("alpaca", {"instruction": "Sum up.", "input": "A text.", "output": "Text."}, ["Sum up.\n\nA text.", "Text."]),
        ("dolly15k", {"INSTRUCTION": "Why?", "RESPONSE": "So.", "METADATA": {"CONTEXT": "It is."}}, ["Why?\n\nIt is.", "So."]),
        (
            "dolly15k_multilingual",
            {"instruction": "Warum?", "context": "", "response": "Darum."},
            ["Warum?", "Darum."],
        ),
        ("dolphin-mix", {"instruction": "Be brief.", "input": "Why?", "output": "So."}, ["Be brief.", "Why?", "So."]),
        (
            "soda",
            {"narrative": "They meet.", "speakers": ["Ann", "Bob"], "dialogue": ["Hi.", "Hello."]},
            ["They meet. You are Bob.", "Hi.", "Hello."],
        ),
        ("soda_dialogue", {"conversation": "User: Hi.\nAssistant: Hello."}, ["Hi.", "Hello."]),
        ("vicuna", {"conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}]}, ["Hi.", "Hello."]),
        (
            "orca-chat",
            {"instruction": "Be brief.", "conversation": [{"input": "Hi.", "output": "Hello."}]},
            ["Be brief.", "Hi.", "Hello."],
        ),
    ],
)
def test_sets_of_conversations(name: str, row: dict[str, Any], turns: list[str]) -> None:
    (thread,) = read(name, row).threads
    assert [message.content for message in thread.messages] == turns
