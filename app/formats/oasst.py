"""Open-Assistant conversation trees: exported trees, nested messages, and the hub's flat message rows.

The extraction follows Open-Assistant's `load_oasst_export` with its faults mended: a deleted, synthetic or rejected message is
cut off together with everything below it *before* anything is extracted, so ranked replies are filtered like prefixes and an
answer whose follow-ups were deleted counts as a leaf; groups left with one reply are dropped, and so are tied replies;
prompts of trees that wait in the prompt lottery are used for PPO.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

from app.errors import DataError
from app.formats.labels import parse_labels
from app.formats.oasst_flat import FlatTrees, JoinedTree
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
    set_aside,
)
from app.formats.screening import check_length, phrase_in

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
    who = f"tree {root.id}"
    if twice := next((name for name, times in Counter(path[-1].id for path in _paths(root)).items() if times > 1), None):
        raise DataError(f"{who}: message {twice} stands in it twice")
    return Tree(
        id=_short(row, "message_tree_id", who) or root.id,
        state=_short(row, "tree_state", who) or READY,
        lang=_short(prompt, "lang", who),
        root_accepted=bool(_flag(prompt, "review_result")),
        root=root,
    )


def _parse_node(message: Mapping[str, Any], expected: str) -> Node:
    name, role, text, rank = (message.get(key) for key in ("message_id", "role", "text", "rank"))
    if not isinstance(name, str) or not name:
        raise DataError("a message has no `message_id`")
    if fault := fault_of(name):
        raise DataError(f"message {name}: `message_id` {fault}")
    if not isinstance(role, str) or role not in _CHAT_ROLE:
        raise DataError(f"message {name}: role {role!r} is neither prompter nor assistant")
    if role != expected:
        raise DataError(f"message {name}: role {role} where roles must alternate, starting with prompter")
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"message {name}: `text` is missing or empty")
    if fault := fault_of(text):
        raise DataError(f"message {name}: `text` {fault}")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int)):
        raise DataError(f"message {name}: rank {rank!r} is no whole number")
    replies = [] if message.get("replies") is None else message["replies"]
    if not isinstance(replies, list) or not all(isinstance(reply, Mapping) for reply in replies):
        raise DataError(f"message {name}: `replies` is no list of messages")
    if strange := next((reply["parent_id"] for reply in replies if reply.get("parent_id") not in (None, name)), None):
        raise DataError(f"message {name}: a reply names {strange!r} as its parent")
    following = "assistant" if expected == "prompter" else "prompter"
    return Node(
        id=name,
        role=_CHAT_ROLE[role],
        text=text,
        rank=rank,
        usable=not (_flag(message, "deleted") or _flag(message, "synthetic") or _flag(message, "review_result") is False),
        replies=tuple(_parse_node(reply, following) for reply in replies),
        labels=parse_labels(message),
    )


def _flag(message: Mapping[str, Any], key: str) -> bool | None:
    value = message.get(key)
    if value is not None and not isinstance(value, bool):
        raise DataError(f"message {message.get('message_id')}: `{key}` {value!r} is neither true nor false")
    return value


def _short(row: Mapping[str, Any], key: str, who: str) -> str | None:
    """An id, a state or a language; None where it is missing or empty."""
    value = row.get(key)
    if value is not None and not isinstance(value, str):
        raise DataError(f"{who}: `{key}` {value!r} is no text")
    if value and (fault := fault_of(value)):
        raise DataError(f"{who}: `{key}` {fault}")
    return value or None


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


def _threads(tree: Tree, root: Node, filters: Filters) -> Iterator[Thread]:
    """Root-to-leaf conversations. A trailing user turn is dropped; of several trailing ones the first stands for all."""
    for path in _paths(root):
        if path[-1].replies or len(path) < 2:
            continue
        if path[-1].role == "user":
            if path[-2].replies[0] is not path[-1]:
                continue
            path = path[:-1]
        messages = _messages(path)
        if _among_best(path, filters.top_k) and not phrase_in(messages, filters.phrases):
            yield Thread(path[-1].id, tree.id, messages)


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


def _best_reply(question: Node) -> str | None:
    """The reply of the lowest rank; an unranked one only where it is the only reply."""
    ranked = [reply for reply in question.replies if reply.rank is not None]
    if not ranked:
        return question.replies[0].text if len(question.replies) == 1 else None
    return min(ranked, key=lambda reply: reply.rank or 0).text


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
        threads=tuple(_threads(tree, root, filters)),
        groups=tuple(group for path in questions if (group := _group(tree, path))),
        prompts=tuple(PromptItem(path[-1].id, tree.id, _messages(path), reference=_best_reply(path[-1])) for path in questions),
    )


# --- the format ----------------------------------------------------------------------------------------------------------


def _is_flat(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("message_id"), str) and "replies" not in value and "prompt" not in value


def _matches(value: Any) -> bool:
    return isinstance(value, Mapping) and ("message_id" in value or ("message_tree_id" in value and "prompt" in value))


def _read(rows: Iterable[Row], filters: Filters) -> Iterator[TreeRecords | BadRow]:
    """Trees as they come; flat messages are held until their tree is there to be joined."""
    seen: set[str] = set()
    flat = FlatTrees()
    for row in rows:
        if not _matches(row.value):
            yield set_aside(row, "neither a message tree nor a message of the OASST export format")
        elif _is_flat(row.value):
            yield from _joined(flat.add(row), filters, seen)
        else:
            yield _extracted(row, filters, seen)
    yield from _joined(flat.rest(), filters, seen)


def _joined(trees: Iterable[JoinedTree | BadRow], filters: Filters, seen: set[str]) -> Iterator[TreeRecords | BadRow]:
    for tree in trees:
        if isinstance(tree, BadRow):
            yield tree
            continue
        found = _extracted(tree.root, filters, seen)
        yield found
        if isinstance(found, BadRow):
            yield from (set_aside(row, f"its tree cannot be used: {found.reason}") for row in tree.rows[1:])


def _extracted(row: Row, filters: Filters, seen: set[str]) -> TreeRecords | BadRow:
    try:
        tree = parse_tree(row.value)
        if tree.id in seen:
            raise DataError(f"tree {tree.id} was already read")
        seen.add(tree.id)
        records = extract(tree, filters)
        check_length(records, filters.max_characters)
    except DataError as error:
        return set_aside(row, str(error))
    except RecursionError:
        return set_aside(row, "replies are nested too deeply")
    return records


FORMAT = Format(matches=_matches, read=_read)
