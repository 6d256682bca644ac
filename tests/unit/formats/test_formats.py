"""Format detection and single rows."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from app.errors import DataError
from app.formats import FORMATS, detect_format
from app.formats.oasst import extract, parse_tree
from app.formats.records import STORED, BadRow, Filters, Labels, Row, TreeRecords


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


REPLY = {"message_id": "b", "role": "assistant", "text": "So."}


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
        ({"replies": [REPLY | {"parent_id": "c"}]}, "a reply names 'c' as its parent"),
        ({"replies": [REPLY | {"message_id": "a"}]}, "message a stands in it twice"),
        ({"replies": [REPLY, REPLY]}, "message b stands in it twice"),
        ({"replies": {"b": REPLY}}, "no list of messages"),
        ({"role": ["prompter"]}, "neither prompter nor assistant"),
        ({"text": "a\ud800"}, "half a character"),
        ({"text": 3}, "missing or empty"),
        ({"message_id": "a\ud800"}, "half a character"),
        ({"lang": ["en"]}, "`lang` .* is no text"),
        ({"rank": 10**400}, None),
        ({"rank": True}, "no whole number"),
        ({"deleted": "false"}, "`deleted` 'false' is neither true nor false"),
        ({"synthetic": 0}, "`synthetic` 0 is neither true nor false"),
        ({"review_result": "true"}, "`review_result` 'true' is neither true nor false"),
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
def test_reasons(change: dict[str, Any], reason: str | None) -> None:
    message = {"message_id": "a", "role": "prompter", "text": "Why?", "replies": []}
    assert parse_tree({"message_tree_id": "a", "prompt": message}).root.text == "Why?"
    with nullcontext() if reason is None else pytest.raises(DataError, match=reason):
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


SMALL = Path(__file__).parents[2] / "fixtures" / "oasst_small.jsonl"


def read_small(**options: Any) -> list[TreeRecords | BadRow]:
    rows = [Row("f", line, text, json.loads(text)) for line, text in enumerate(SMALL.read_text().splitlines(), 1)]
    return list(FORMATS["oasst"].read(rows, Filters(**options)))


def test_phrases_leave_out_threads_of_a_tree_but_no_ranking() -> None:
    whole, screened = read_small(), read_small(phrases=("six minutes",))
    kept, left = ([thread for tree in trees if isinstance(tree, TreeRecords) for thread in tree.threads] for trees in (screened, whole))
    assert 0 < len(kept) < len(left)
    assert kept == [thread for thread in left if "Six minutes" not in str(thread.messages)]
    groups = [[group for tree in trees if isinstance(tree, TreeRecords) for group in tree.groups] for trees in (screened, whole)]
    assert groups[0] == groups[1]


def test_a_tree_with_a_huge_message_is_set_aside() -> None:
    message = {"message_id": "a", "role": "prompter", "text": "x" * 10_000_000, "review_result": True}
    (bad,) = FORMATS["oasst"].read([Row("f", 1, json.dumps(message), {**message, "replies": []})], Filters())
    assert isinstance(bad, BadRow)
    assert "10000000 characters" in bad.reason
    assert len(bad.text) < 2 * STORED


@pytest.mark.parametrize("value", [["en"], 3, {"a": 1}, True])
def test_ids_and_states_of_other_types(value: Any) -> None:
    message = {"message_id": "a", "role": "prompter", "text": "Why?", "replies": [], "review_result": True}
    rows = [Row("f", 1, "", {"message_tree_id": value, "prompt": message}), Row("f", 2, "", message | {"tree_state": value})]
    assert ["is no text" in item.reason for item in FORMATS["oasst"].read(rows, Filters()) if isinstance(item, BadRow)] == [True, True]


@pytest.mark.parametrize(
    "labels",
    [
        {},
        {"quality": None},
        {"quality": {"value": None, "count": 0}, "humor": None},
        {"name": ["quality", "humor"], "value": [None, 0.5], "count": [0, 3]},
        {"name": None, "value": None, "count": None},
        {"quality": 3},
        {"quality": {"value": 10**400}},
        {"quality": {"value": float("nan")}},
        {"name": ["quality"], "value": []},
        [{"name": "quality"}],
        "good",
    ],
)
def test_labels_of_any_shape_break_nothing(labels: Any) -> None:
    message = {"message_id": "a", "role": "prompter", "text": "Why?", "lang": "en", "review_result": True, "labels": labels}
    rows = [Row("f", 1, "", {**message, "replies": [REPLY | {"labels": labels}]}), Row("f", 2, "", message | {"message_id": "c"})]
    assert len(list(FORMATS["oasst"].read(rows, Filters()))) == 2


@pytest.mark.parametrize(
    ("replies", "reference"),
    [
        ([("b", 1), ("a", 0)], "a"),  # best of the ranked ones, wherever it stands
        ([("a", None), ("b", 2)], "b"),
        ([("a", None)], "a"),
        ([("a", None), ("b", None)], None),  # nobody said which is good
        ([], None),
    ],
)
def test_reference_answer_of_a_prompt_is_its_best_reply(replies: list[tuple[str, int | None]], reference: str | None) -> None:
    nodes = [{"message_id": text, "role": "assistant", "text": text, "rank": rank} for text, rank in replies]
    root = {"message_id": "q", "role": "prompter", "text": "Why?", "review_result": True, "replies": nodes}
    tree = parse_tree({"message_tree_id": "q", "tree_state": "ready_for_export", "prompt": root})
    (prompt,) = extract(tree, Filters()).prompts
    assert prompt.reference == reference
