"""Prompts alone: one JSON string a line. They serve PPO; SFT and reward models find nothing to train on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

from app.formats.records import BadRow, Filters, Format, Message, PromptItem, Row, TreeRecords


def _matches(value: Any) -> bool:
    return isinstance(value, str)


def _read(rows: Iterable[Row], filters: Filters) -> tuple[list[TreeRecords], list[BadRow]]:
    """A prompt that occurs twice is kept once, so that no prompt is on both sides of the split."""
    trees: dict[str, TreeRecords] = {}
    bad: list[BadRow] = []
    for row in rows:
        if not isinstance(row.value, str) or not row.value.strip():
            bad.append(BadRow(row.file, row.line, row.text, "not a JSON string with text in it"))
            continue
        tree_id = hashlib.sha256(row.value.encode()).hexdigest()[:16]
        item = PromptItem(tree_id, tree_id, (Message("user", row.value),))
        trees[tree_id] = TreeRecords(tree_id, messages=1, prompts=(item,))
    return list(trees.values()), bad


FORMAT = Format(matches=_matches, read=_read)
