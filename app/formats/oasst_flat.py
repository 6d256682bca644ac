"""Flat message rows of the OASST export and of the hub, joined into trees by `message_tree_id` and `parent_id` as they come."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from app.formats.records import BadRow, Row, set_aside

WINDOW = 200_000
"""Rows that are held at most: all rows of a tree must stand within so many. Rows without `message_tree_id` are held until the end."""
KEPT = {
    "message_id",
    "parent_id",
    "message_tree_id",
    "tree_state",
    "text",
    "role",
    "lang",
    "review_result",
    "deleted",
    "synthetic",
    "rank",
    "labels",
}
"""Columns that are held; the hub's rows have as many again that nothing reads."""


_Children = dict[str | None, list[Row]]
"""The messages that name a message as their parent, by its id."""


@dataclass(frozen=True)
class JoinedTree:
    """root: the root's row, with nested `replies`; rows: those of all messages, the root's first."""

    root: Row
    rows: tuple[Row, ...]


@dataclass
class FlatTrees:
    """Trees whose rows are being collected; the oldest is joined when more than `window` rows are held."""

    window: int = WINDOW
    _open: dict[str | None, list[Row]] = field(default_factory=dict)
    _closed: set[str] = field(default_factory=set)
    _held: int = 0

    def add(self, row: Row) -> Iterator[JoinedTree | BadRow]:
        """Takes a row; gives the trees that it pushes out of the window."""
        tree_id = row.value.get("message_tree_id")
        if tree_id is not None and not isinstance(tree_id, str):
            yield set_aside(row, f"message {row.value['message_id']}: `message_tree_id` {tree_id!r} is no text")
            return
        if tree_id in self._closed:
            yield set_aside(row, f"tree {tree_id} began over {self.window} rows before this one: sort the rows by message_tree_id")
            return
        self._open.setdefault(tree_id, []).append(replace(row, value={key: row.value[key] for key in KEPT & row.value.keys()}))
        self._held += 1
        while self._held > self.window and (oldest := next((name for name in self._open if name is not None), None)) is not None:
            self._closed.add(oldest)
            yield from self._join(oldest)

    def rest(self) -> Iterator[JoinedTree | BadRow]:
        """The trees that are left when all rows are there."""
        for tree_id in tuple(self._open):
            yield from self._join(tree_id)

    def _join(self, tree_id: str | None) -> Iterator[JoinedTree | BadRow]:
        rows = self._open.pop(tree_id)
        self._held -= len(rows)
        yield from join(rows, tree_id)


def join(rows: Sequence[Row], tree_id: str | None) -> Iterator[JoinedTree | BadRow]:
    """Nests messages by `parent_id`: one tree of the given id, or without an id every tree that the rows have. Rows that hang on no
    root of it are bad."""
    messages: dict[str, Row] = {}
    children: _Children = defaultdict(list)
    for row in rows:
        name, parent = row.value["message_id"], row.value.get("parent_id")
        if name in messages:
            yield set_aside(row, f"message {name} was already read")
        elif parent is not None and not isinstance(parent, str):
            yield set_aside(row, f"message {name}: `parent_id` {parent!r} is no text")
        else:
            messages[name] = row
            children[parent].append(row)
    roots = children.pop(None, [])
    if tree_id is not None and len(roots) > 1:
        roots.sort(key=lambda row: row.value["message_id"] != tree_id)  # a tree is named after its root
        for other in roots[1:]:
            reason = f"tree {tree_id} has two roots, {roots[0].value['message_id']} and {other.value['message_id']}"
            yield from (set_aside(row, reason) for row in _below(other, children))
        roots = roots[:1]
    yield from (_nest(root, _below(root, children)) for root in roots)
    yield from _stranded(messages.keys(), children)


def _stranded(names: Collection[str], children: _Children) -> Iterator[BadRow]:
    """Messages that no root was found above: below one whose parent is missing, or in or below a circle."""
    for parent in [name for name in children if name not in names]:
        for top in children.pop(parent):
            reason = f"its parent {parent!r} is not in the data"
            for row in _below(top, children):
                yield set_aside(row, reason)
                reason = f"message {top.value['message_id']} above it has no parent in the data"
    for row in (row for siblings in children.values() for row in siblings):
        yield set_aside(row, f"its parents lead in a circle, by {row.value['parent_id']!r}")


def _below(top: Row, children: _Children) -> tuple[Row, ...]:
    """A message and all messages below it, each behind its parent. They are taken out of `children`, of which circles remain."""
    found, todo = [], [top]
    while todo:
        row = todo.pop()
        found.append(row)
        todo.extend(reversed(children.pop(row.value["message_id"], [])))
    return tuple(found)


def _nest(root: Row, rows: tuple[Row, ...]) -> JoinedTree:
    nested: dict[str, dict[str, Any]] = {}
    for row in rows:
        message = nested[row.value["message_id"]] = {**row.value, "replies": []}
        if row is not root:
            nested[message["parent_id"]]["replies"].append(message)
    return JoinedTree(replace(root, value=nested[root.value["message_id"]]), rows)
