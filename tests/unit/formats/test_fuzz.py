"""Whatever JSON a file holds, a format gives records or a reason."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from app.data.decoding import decode
from app.data.source import RawLine
from app.formats import FORMATS, detect_format
from app.formats.records import BadRow, Filters, Row, TreeRecords

KEYS = [
    "message_id", "parent_id", "message_tree_id", "tree_state", "prompt", "role", "text", "lang", "rank", "deleted", "review_result",
    "replies", "chosen", "rejected", "prefixes", "responses", "scores", "best", "augmented", "messages", "conversations", "content",
    "from", "value", "input", "output", "response", "system",
]  # fmt: skip
WORDS = ["", "a", "user", "assistant", "prompter", "Why?", "\0", "\ud800", "\n\nHuman: a\n\nAssistant: b", "User: a\nBot: b"]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(WORDS)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5), max_leaves=8
)
ROWS = st.lists(st.dictionaries(st.sampled_from(KEYS), JSON, max_size=6) | JSON, max_size=3)
COLUMNS: list[dict[str, str | tuple[str, ...]]] = [
    {},
    {"prompt": "text", "response": "value", "messages": "conversations", "chosen": "text", "rejected": "role"},
    {"prompt": "{text} {value.0}", "responses": ("text", "value.role"), "scores": ("rank", "value.rank"), "system": "prompt.text"},
    {"prefixes": "messages", "responses": "value", "best": "rank", "augmented": "replies", "input": "value.1"},
]


@settings(max_examples=200, deadline=None)
@given(values=ROWS, columns=st.sampled_from(COLUMNS))
def test_records_or_a_reason(values: list[Any], columns: dict[str, str | tuple[str, ...]]) -> None:
    rows = [Row("f", line, repr(value), value) for line, value in enumerate(values, 1)]
    for name, data_format in FORMATS.items():
        found = list(data_format.read(rows, Filters(columns=columns, phrases=("a",), top_k=1)))
        for item in found:
            assert isinstance(item, TreeRecords | BadRow)
            if isinstance(item, BadRow):
                f"{item.reason}{item.text}".encode()  # can be written
                assert item.reason
            else:
                item.tree_id.encode()
                assert all(message.content.encode().strip() for thread in item.threads for message in thread.messages)
                assert all(len(group.replies) >= 2 for group in item.groups)
        assert len(found) == len(values) or name == "oasst"  # there a row may be one message of a tree
    assert all(detect_format(value) in {None, *FORMATS} for value in values)


MESSAGES = st.lists(
    st.fixed_dictionaries(
        {
            "message_id": st.sampled_from("abcdef"),
            "parent_id": st.none() | st.sampled_from("abcdefgh"),
            "role": st.sampled_from(["prompter", "assistant"]),
            "text": st.sampled_from(["Why?", "So."]),
            "review_result": st.just(True),
        },
        optional={"message_tree_id": st.none() | st.sampled_from("abc"), "rank": st.integers(0, 3), "lang": st.just("en")},
    ),
    max_size=12,
)


@settings(max_examples=200, deadline=None)
@given(values=MESSAGES)
def test_no_flat_message_is_lost(values: list[Any]) -> None:
    rows = [Row("f", line, "", value) for line, value in enumerate(values, 1)]
    found = list(FORMATS["oasst"].read(rows, Filters()))
    bad = [item for item in found if isinstance(item, BadRow)]
    trees = [item for item in found if isinstance(item, TreeRecords)]
    assert len({row.line for row in bad}) == len(bad)
    assert len(bad) + sum(tree.messages for tree in trees) == len(values)


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode()))
def test_every_line_is_decoded_or_has_a_reason(data: bytes) -> None:
    found = decode(RawLine("f", 1, data))
    assert isinstance(found, Row | BadRow)
    if isinstance(found, BadRow):
        f"{found.reason}{found.text}".encode()
