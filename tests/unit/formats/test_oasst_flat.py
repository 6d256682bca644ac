"""Flat messages: joined into the trees that they come from, in any order, and what is set aside with which reason."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.formats.oasst import FORMAT
from app.formats.oasst_flat import FlatTrees, JoinedTree
from app.formats.records import BadRow, Filters, Row, TreeRecords

ROOT = Path(__file__).parents[3]
SMALL = ROOT / "tests" / "fixtures" / "oasst_small.jsonl"
REAL = Path(os.environ.get("CORRAL_OASST_DATA") or ROOT.parent / "shared" / "data") / "en_100_tree.jsonl"


def hub_rows(tree: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of a tree as the hub holds them: depth first, every column there, maps as parallel lists, the state on every row."""

    def below(message: dict[str, Any], parent: str | None) -> Iterator[dict[str, Any]]:
        absent = dict.fromkeys(("rank", "model_name", "detoxify", "labels", "user_id", "created_date"))
        emojis = message.get("emojis")
        parallel = None if emojis is None else {"name": list(emojis), "count": list(emojis.values())}
        row = {key: value for key, value in message.items() if key != "replies"}
        ids = {"parent_id": parent, "message_tree_id": tree["message_tree_id"], "tree_state": tree["tree_state"]}
        yield {**absent, **row, **ids, "emojis": parallel}
        for reply in message["replies"]:
            yield from below(reply, message["message_id"])

    yield from below(tree["prompt"], None)


def read(values: list[Any], **options: Any) -> tuple[list[TreeRecords], list[BadRow]]:
    rows = [Row("f", line, json.dumps(value), value) for line, value in enumerate(values, 1)]
    found = list(FORMAT.read(rows, Filters(**options)))
    return [item for item in found if isinstance(item, TreeRecords)], [item for item in found if isinstance(item, BadRow)]


def message(name: str, parent: Any, **change: Any) -> dict[str, Any]:
    role = "assistant" if str(parent).startswith("u") else "prompter"
    row = {"message_id": name, "parent_id": parent, "message_tree_id": "u1", "role": role, "text": f"{name}.", "lang": "en"}
    return {**row, "review_result": True, **change}


@pytest.mark.parametrize("source", [SMALL, REAL], ids=["small", "real"])
def test_hub_rows_give_the_same_records_as_trees(source: Path) -> None:
    if not source.is_file():
        pytest.skip("no real OASST trees here")
    trees = [json.loads(line) for line in source.read_text().splitlines()]
    nested, bad = read(trees)
    assert not bad
    rows = [row for tree in trees for row in hub_rows(tree)]
    assert read(rows) == (nested, [])
    assert read([{key: value for key, value in row.items() if key != "message_tree_id"} for row in rows]) == (nested, [])


def test_rows_of_trees_in_between_each_other_give_the_same_records() -> None:
    trees = [json.loads(line) for line in SMALL.read_text().splitlines()]
    queues, rng, rows = [list(hub_rows(tree)) for tree in trees], random.Random(3), []
    while queues := [queue for queue in queues if queue]:
        rows.append(rng.choice(queues).pop(0))
    joined, bad = read(rows)
    assert not bad
    assert sorted(joined, key=lambda tree: tree.tree_id) == sorted(read(trees)[0], key=lambda tree: tree.tree_id)


def test_a_reply_may_stand_before_what_it_replies_to() -> None:
    rows = [message("u1", None), message("a2", "u1", rank=0), message("a3", "u1", rank=1), message("u4", "a2")]
    (tree,), bad = read(rows[::-1])
    assert not bad
    assert (tree.messages, [group.replies for group in tree.groups]) == (4, [("a2.", "a3.")])


def test_the_window_bounds_what_is_held() -> None:
    flat = FlatTrees(window=4)
    found: list[JoinedTree | BadRow] = []
    rows = [
        message(f"u{tree}-{part}", None if part == 0 else f"u{tree}-0", message_tree_id=f"t{tree}")
        for tree in range(5)
        for part in range(3)
    ]
    for line, value in enumerate([*rows, message("u0-3", "u0-0", message_tree_id="t0")], 1):
        found.extend(flat.add(Row("f", line, "", value)))
        assert sum(map(len, flat._open.values())) <= 4
    found.extend(flat.rest())
    assert [len(tree.rows) for tree in found if isinstance(tree, JoinedTree)] == [3] * 5
    (late,) = (item for item in found if isinstance(item, BadRow))
    assert (late.line, late.reason) == (16, "tree t0 began over 4 rows before this one: sort the rows by message_tree_id")


@pytest.mark.parametrize(
    ("rows", "reasons"),
    [
        (
            [message("u1", None), message("a2", "x"), message("u3", "a2"), message("a4", "u3")],
            {2: "its parent 'x' is not in the data", **dict.fromkeys((3, 4), "message a2 above it has no parent in the data")},
        ),
        (
            [message("u1", None), message("a2", "u3"), message("u3", "a2")],
            {2: "its parents lead in a circle, by 'u3'", 3: "its parents lead in a circle, by 'a2'"},
        ),
        ([message("u1", "u1")], {1: "its parents lead in a circle, by 'u1'"}),
        ([message("u9", None), message("a2", "u9"), message("u1", None)], dict.fromkeys((1, 2), "tree u1 has two roots, u1 and u9")),
        ([message("u1", None), message("a2", "u1"), message("a2", "u1")], {3: "message a2 was already read"}),
        ([message("u1", None), message("a2", 7)], {2: "message a2: `parent_id` 7 is no text"}),
        ([message("u1", None, message_tree_id=["u1"])], {1: "message u1: `message_tree_id` ['u1'] is no text"}),
        (
            [message("u1", None), message("a2", "u1", text=""), message("u3", "a2")],
            {
                1: "message a2: `text` is missing or empty",
                **dict.fromkeys((2, 3), "its tree cannot be used: message a2: `text` is missing or empty"),
            },
        ),
    ],
)
def test_reasons(rows: list[Any], reasons: dict[int, str]) -> None:
    good = message("u0", None, message_tree_id="u0")
    trees, bad = read([*rows, good])
    assert {row.line: row.reason for row in bad} == reasons
    assert len(bad) == len(reasons)
    assert trees[-1].tree_id == "u0"


def test_a_long_chain_of_messages_is_set_aside() -> None:
    rows = [message("u0", None)] + [message(f"{'au'[k % 2 == 0]}{k}", f"{'au'[k % 2]}{k - 1}") for k in range(1, 5000)]
    trees, bad = read(rows)
    assert not trees
    assert len(bad) == 5000
    assert bad[0].reason == "replies are nested too deeply"
