"""Format detection and single rows."""

from __future__ import annotations

from typing import Any

import pytest

from app.errors import DataError
from app.formats import FORMATS, detect_format
from app.formats.oasst import parse_tree
from app.formats.records import Filters, Row, TreeRecords


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
        ({"replies": [{"message_id": "b", "role": "prompter", "text": "?"}]}, "roles must alternate"),
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


def test_equal_prompts_are_one_tree() -> None:
    rows = [Row("f", line, text, text) for line, text in enumerate(["Why?", "How?", "Why?"], 1)]
    first, second, third = FORMATS["prompts"].read(rows, Filters())
    assert first == third
    assert isinstance(first, TreeRecords) and isinstance(second, TreeRecords)
    assert first.tree_id != second.tree_id
