"""Format detection and single rows."""

from __future__ import annotations

from typing import Any

import pytest

from app.errors import DataError
from app.formats import FORMATS, detect_format
from app.formats.oasst import parse_tree
from app.formats.records import Filters, Labels, Row, TreeRecords


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("Why?", "prompts"),
        ({"message_tree_id": "a", "prompt": {}}, "oasst"),
        ({"message_id": "a", "text": "Why?"}, "oasst"),
        ({"chosen": "a", "rejected": "b"}, None),
        (3, None),
    ],
)
def test_detection(value: Any, name: str | None) -> None:
    assert detect_format(value) == name


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"role": "user"}, "neither prompter nor assistant"),
        ({"text": "  "}, "missing or empty"),
        ({"text": None}, "missing or empty"),
        ({"text": "a\0b"}, "NUL byte"),
        ({"message_id": 3}, "no `message_id`"),
        ({"rank": "0"}, "no whole number"),
        ({"replies": ["text"]}, "no list of messages"),
        ({"text": "a\ud83d"}, "message a: `text` holds half a character"),
        ({"replies": [{"message_id": "b", "role": "prompter", "text": "?"}]}, "roles must alternate"),
        ({"lang": 3}, "message a: `lang` 3 is no text"),
        ({"labels": [0.5]}, "message a: `labels` is no map"),
        ({"labels": {"quality": 0.5}}, "message a: label 'quality' has no `value`"),
        ({"labels": {"spam": {"value": "0.5", "count": 1}}}, "message a: label 'spam' is '0.5' and not between 0 and 1"),
        ({"labels": {"quality": {"value": 1.5}}}, "message a: label 'quality' is 1.5 and"),
        ({"labels": {"quality": {"value": float("nan")}}}, "label 'quality' is nan and"),
        ({"labels": {"quality": {"value": True}}}, "label 'quality' is True and"),
        ({"labels": {"name": ["quality"], "value": [], "count": []}}, "message a: `labels` has lists"),
    ],
)
def test_reasons(change: dict[str, Any], reason: str) -> None:
    message = {"message_id": "a", "role": "prompter", "text": "Why?", "replies": []}
    assert parse_tree({"message_tree_id": "a", "prompt": message}).root.text == "Why?"
    with pytest.raises(DataError, match=reason):
        parse_tree({"message_tree_id": "a", "prompt": message | change})


def test_nested_message_is_a_tree() -> None:
    tree = parse_tree({"message_id": "a", "role": "prompter", "text": "Why?", "replies": [], "lang": "en", "review_result": True})
    assert (tree.id, tree.state, tree.lang, tree.root_accepted) == ("a", "ready_for_export", "en", True)


@pytest.mark.parametrize(
    ("fields", "labels"),
    [
        ({}, None),
        ({"lang": None, "labels": None}, None),
        ({"lang": "de"}, Labels(lang="de")),
        ({"labels": {"quality": {"value": 0.75, "count": 3}, "humor": None, "spam": {"value": 0}}}, Labels(quality=0.75)),
        ({"labels": {"creativity": {"value": None, "count": 0}, "humor": {"value": 1}}}, Labels(humor=1.0)),
        ({"labels": {"name": ["quality", "spam", "humor"], "value": [0.5, 0.0, None], "count": [3, 3, 0]}}, Labels(quality=0.5)),
        ({"labels": {"name": None, "value": None, "count": None}, "lang": "en"}, Labels(lang="en")),
    ],
)
def test_labels_of_exports_and_of_the_hub(fields: dict[str, Any], labels: Labels | None) -> None:
    message = {"message_id": "a", "role": "prompter", "text": "Why?", "replies": []}
    assert parse_tree({"message_tree_id": "a", "prompt": message | fields}).root.labels == labels


def test_records_carry_the_labels_of_their_messages() -> None:
    def reply(name: str, rank: int, quality: float | None) -> dict[str, Any]:
        labels = None if quality is None else {"quality": {"value": quality, "count": 3}}
        return {"message_id": name, "role": "assistant", "text": name, "rank": rank, "labels": labels, "replies": []}

    root = {"message_id": "a", "role": "prompter", "text": "Why?", "lang": "en", "review_result": True}
    row = {"message_tree_id": "a", "prompt": root | {"replies": [reply("c", 1, None), reply("b", 0, 0.9)]}}
    (records,) = FORMATS["oasst"].read([Row("f", 1, "", row)], Filters())
    assert isinstance(records, TreeRecords)
    assert records.groups[0].replies == ("b", "c")
    assert records.groups[0].reply_labels == (Labels(quality=0.9), None)
    assert [[message.labels for message in thread.messages] for thread in records.threads] == [
        [Labels(lang="en"), None],
        [Labels(lang="en"), Labels(quality=0.9)],
    ]


def test_equal_prompts_are_one_tree() -> None:
    rows = [Row("f", line, text, text) for line, text in enumerate(["Why?", "How?", "Why?"], 1)]
    first, second, third = FORMATS["prompts"].read(rows, Filters())
    assert first == third
    assert isinstance(first, TreeRecords) and isinstance(second, TreeRecords)
    assert first.tree_id != second.tree_id
