"""Open-Assistant conversation trees: exported trees, nested messages, and the hub's flat message rows.

The extraction follows Open-Assistant's `load_oasst_export` with its faults mended: a deleted, synthetic or rejected message is
cut off together with everything below it *before* anything is extracted, so ranked replies are filtered like prefixes and an
answer whose follow-ups were deleted counts as a leaf; groups left with one reply are dropped, and so are tied replies;
prompts of trees that wait in the prompt lottery are used for PPO.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

from app.errors import DataError
from app.formats.labels import parse_labels
from app.formats.records import (
    BadRow,
    Filters,
    Format,
    Labels,
    Message,
    PromptItem,
    RankedGroup,
    Row,
    Thread,
    TreeRecords,
    fault_of,
)

READY = "ready_for_export"
LOTTERY = "prompt_lottery_waiting"
_CHAT_ROLE: dict[str, Literal["user", "assistant"]] = {"prompter": "user", "assistant": "assistant"}


@dataclass(frozen=True)
class Node:
    """One message of a tree. rank: 0 is the best of its siblings; usable: neither deleted, synthetic nor rejected in review."""

    id: str
    role: Literal["user", "assistant"]
    text: str
    rank: int | None
    usable: bool
    replies: tuple[Node, ...]
    labels: Labels | None = None


@dataclass(frozen=True)
class Tree:
    """root_accepted: the root's `review_result` was true; lang: the root's language."""

    id: str
    state: str
    lang: str | None
    root_accepted: bool
    root: Node


# --- parsing -------------------------------------------------------------------------------------------------------------


def parse_tree(row: Mapping[str, Any]) -> Tree:
    """A tree row `{"message_tree_id", "tree_state", "prompt"}` or a root message with nested `replies`.

    A missing `tree_state` counts as ready for export. Raises DataError with the reason when a field is missing or wrong.
    """
    prompt = row.get("prompt", row)
    if not isinstance(prompt, Mapping):
        raise DataError("`prompt` is no message")
    root = _parse_node(prompt, expected="prompter")
    return Tree(
        id=str(row.get("message_tree_id") or root.id),
        state=row.get("tree_state") or READY,
        lang=prompt.get("lang"),
        root_accepted=bool(prompt.get("review_result")),
        root=root,
    )


def _parse_node(message: Mapping[str, Any], expected: str) -> Node:
    name, role, text, rank = (message.get(key) for key in ("message_id", "role", "text", "rank"))
    if not isinstance(name, str) or not name:
        raise DataError("a message has no `message_id`")
    if role not in _CHAT_ROLE:
        raise DataError(f"message {name}: role {role!r} is neither prompter nor assistant")
    if role != expected:
        raise DataError(f"message {name}: role {role} where roles must alternate, starting with prompter")
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"message {name}: `text` is missing or empty")
    if fault := fault_of(text):
        raise DataError(f"message {name}: `text` {fault}")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int)):
        raise DataError(f"message {name}: rank {rank!r} is no whole number")
    replies = message.get("replies") or []
    if not isinstance(replies, Sequence) or not all(isinstance(reply, Mapping) for reply in replies):
        raise DataError(f"message {name}: `replies` is no list of messages")
    following = "assistant" if expected == "prompter" else "prompter"
    return Node(
        id=name,
        role=_CHAT_ROLE[role],
        text=text,
        rank=rank,
        usable=not (message.get("deleted") or message.get("synthetic") or message.get("review_result") is False),
        replies=tuple(_parse_node(reply, following) for reply in replies),
        labels=parse_labels(message),
    )


def _join_flat(rows: Sequence[Row]) -> tuple[list[Row], list[BadRow]]:
    """Nest flat message rows by `parent_id`; each result stands at its root's line. Rows that hang on nothing are bad."""
    children: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        children[row.value.get("parent_id")].append(row)
    placed: set[int] = set()

    def nest(row: Row) -> dict[str, Any]:
        placed.add(id(row))
        return {**row.value, "replies": [nest(child) for child in children.get(row.value["message_id"], [])]}

    roots = [replace(row, value=nest(row)) for row in children[None]]
    names = {row.value["message_id"] for row in rows}

    def why(parent: Any) -> str:
        return f"its parents lead in a circle, by {parent!r}" if parent in names else f"its parent {parent!r} is not in the data"

    bad = [BadRow(row.file, row.line, row.text, why(row.value.get("parent_id"))) for row in rows if id(row) not in placed]
    return roots, bad


# --- extraction ----------------------------------------------------------------------------------------------------------


def count_messages(node: Node) -> int:
    """Messages in this subtree, filtered ones included."""
    return 1 + sum(count_messages(reply) for reply in node.replies)


def prune(node: Node) -> Node:
    """The subtree without unusable messages and what hangs below them."""
    return replace(node, replies=tuple(prune(reply) for reply in node.replies if reply.usable))


def _paths(node: Node, above: tuple[Node, ...] = ()) -> Iterator[tuple[Node, ...]]:
    """Every root-to-node path, depth first."""
    path = (*above, node)
    yield path
    for reply in node.replies:
        yield from _paths(reply, path)


def _messages(path: Sequence[Node]) -> tuple[Message, ...]:
    return tuple(Message(node.role, node.text, node.labels) for node in path)


def _among_best(path: Sequence[Node], top_k: int | None) -> bool:
    """Whether each assistant message ranks below top_k; an unranked one passes only where it is the only reply."""
    if top_k is None:
        return True
    answers = ((node, parent) for parent, node in pairwise(path) if node.role == "assistant")
    return all(node.rank < top_k if node.rank is not None else len(parent.replies) == 1 for node, parent in answers)


def _threads(tree: Tree, root: Node, top_k: int | None) -> Iterator[Thread]:
    """Root-to-leaf conversations. A trailing user turn is dropped; of several trailing ones the first stands for all."""
    for path in _paths(root):
        if path[-1].replies or len(path) < 2:
            continue
        if path[-1].role == "user":
            if path[-2].replies[0] is not path[-1]:
                continue
            path = path[:-1]
        if _among_best(path, top_k):
            yield Thread(path[-1].id, tree.id, _messages(path))


def _group(tree: Tree, path: Sequence[Node]) -> RankedGroup | None:
    by_rank: dict[int, Node] = {}
    for reply in path[-1].replies:
        if reply.rank is not None:
            by_rank.setdefault(reply.rank, reply)
    if len(by_rank) < 2:
        return None
    replies = [by_rank[rank] for rank in sorted(by_rank)]
    texts, labels = tuple(reply.text for reply in replies), tuple(reply.labels for reply in replies)
    return RankedGroup(path[-1].id, tree.id, _messages(path), texts, reply_labels=labels)


def extract(tree: Tree, filters: Filters) -> TreeRecords:
    """SFT threads, ranked groups and PPO prompts of one tree; empty where the tree is filtered out."""
    records = TreeRecords(tree.id, count_messages(tree.root), lang=tree.lang)
    if not tree.root.usable or not tree.root_accepted or (filters.lang and tree.lang not in filters.lang):
        return records
    if tree.state == LOTTERY:
        return replace(records, prompts=(PromptItem(tree.root.id, tree.id, _messages([tree.root])),))
    if tree.state != READY:
        return records
    root = prune(tree.root)
    questions = [path for path in _paths(root) if path[-1].role == "user"]
    return replace(
        records,
        threads=tuple(_threads(tree, root, filters.top_k)),
        groups=tuple(group for path in questions if (group := _group(tree, path))),
        prompts=tuple(PromptItem(path[-1].id, tree.id, _messages(path)) for path in questions),
    )


# --- the format ----------------------------------------------------------------------------------------------------------


def _is_flat(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("message_id"), str) and "replies" not in value and "prompt" not in value


def _matches(value: Any) -> bool:
    return isinstance(value, Mapping) and ("message_id" in value or ("message_tree_id" in value and "prompt" in value))


def _read(rows: Iterable[Row], filters: Filters) -> Iterator[TreeRecords | BadRow]:
    """Trees as they come; flat messages are held until the end, when all of them are there to be joined."""
    seen: set[str] = set()
    flat: list[Row] = []
    for row in rows:
        if not _matches(row.value):
            yield BadRow(row.file, row.line, row.text, "neither a message tree nor a message of the OASST export format")
        elif _is_flat(row.value):
            flat.append(row)
        else:
            yield _extracted(row, filters, seen)
    joined, orphans = _join_flat(flat)
    yield from orphans
    yield from (_extracted(row, filters, seen) for row in joined)


def _extracted(row: Row, filters: Filters, seen: set[str]) -> TreeRecords | BadRow:
    try:
        tree = parse_tree(row.value)
        if tree.id in seen:
            raise DataError(f"tree {tree.id} was already read")
        seen.add(tree.id)
        return extract(tree, filters)
    except DataError as error:
        return BadRow(row.file, row.line, row.text, str(error))
    except RecursionError:
        return BadRow(row.file, row.line, row.text, "replies are nested too deeply")


FORMAT = Format(matches=_matches, read=_read)
