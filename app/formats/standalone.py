"""Formats whose rows stand alone: each row is one conversation, and nothing in it points to another row."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from app.errors import DataError
from app.formats.records import (
    BadRow,
    Filters,
    Format,
    Message,
    MessageRole,
    PromptItem,
    RankedGroup,
    Row,
    Thread,
    TreeRecords,
    fault_of,
)

ROLES: dict[str, MessageRole] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
}
"""What the world calls the three roles."""


def standalone(matches: Callable[[Any], bool], parse: Callable[[Any, Filters], TreeRecords], expected: str) -> Format:
    """A format from a function that turns one row into records and raises DataError for a row it cannot use.

    Conversations with the same first user turn belong to one tree, so that none of them is on both sides of the split.
    expected: what a row should be, for the message about one that is something else.
    """

    def read(rows: Iterable[Row], filters: Filters) -> Iterator[TreeRecords | BadRow]:
        for row in rows:
            try:
                if not _could_be(row.value, matches, filters):
                    raise DataError(f"not {expected}")
                yield parse(row.value, filters)
            except DataError as error:
                yield BadRow(row.file, row.line, row.text, str(error))

    return Format(matches=matches, read=read)


def _could_be(value: Any, matches: Callable[[Any], bool], filters: Filters) -> bool:
    return matches(value) or bool(filters.columns and isinstance(value, Mapping))


def conversation(messages: Sequence[Message], *, group: Sequence[str] = ()) -> TreeRecords:
    """Records of one conversation: an SFT thread up to its last assistant turn, a prompt per user turn and, with `group`
    (replies, best first), the ranked group that answers the last user turn.

    Raises DataError unless user and assistant turns alternate, after at most one leading system message.
    """
    turns = check_turns(messages)
    tree_id = digest(next(message.content for message in turns if message.role == "user"))
    replies = tuple(dict.fromkeys(group))
    if group and len(replies) < 2:
        raise DataError("all replies are the same: there is nothing to rank")
    prefix = turns if turns[-1].role == "user" else turns[:-1]
    last = len(turns) - next(k for k, message in enumerate(reversed(turns)) if message.role == "user")
    prompts = {turns[:end] for end in range(1, last + 1) if turns[end - 1].role == "user"}
    thread = turns if turns[-1].role == "assistant" else turns[:-1]
    return TreeRecords(
        tree_id,
        messages=len(turns) + max(0, len(replies) - 1),
        threads=(Thread(_name(thread), tree_id, thread),) if any(message.role == "assistant" for message in thread) else (),
        groups=(RankedGroup(_name(prefix), tree_id, prefix, replies),) if replies else (),
        prompts=tuple(PromptItem(_name(prompt), tree_id, prompt) for prompt in sorted(prompts, key=len)),
    )


def check_turns(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages, unchanged. Raises DataError where their order makes no conversation."""
    turns = tuple(messages)
    body = turns[1:] if turns and turns[0].role == "system" else turns
    if not body or body[0].role != "user":
        raise DataError("a conversation begins with a user turn, after at most one system message")
    for before, after in pairwise(body):
        if after.role == "system":
            raise DataError("a system message stands behind the first user turn")
        if before.role == after.role:
            raise DataError(f"two {after.role} turns follow each other")
    return turns


def text_of(value: Any, name: str) -> str:
    """A column that must hold text. Raises DataError."""
    if not isinstance(value, str):
        raise DataError(f"`{name}` is {'missing' if value is None else 'no text'}")
    if not value.strip():
        raise DataError(f"`{name}` is empty")
    if fault := fault_of(value):
        raise DataError(f"`{name}` {fault}")
    return value


def messages_of(value: Any, name: str) -> tuple[Message, ...]:
    """A list of {"role", "content"} (or {"from", "value"}) mappings. Raises DataError."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise DataError(f"`{name}` is no list of messages")
    turns = []
    for number, item in enumerate(value, 1):
        if not isinstance(item, Mapping):
            raise DataError(f"`{name}`: message {number} is no mapping")
        role = item.get("role", item.get("from"))
        if not isinstance(role, str) or role.lower() not in ROLES:
            raise DataError(f"`{name}`: message {number} has the role {role!r}; known are {', '.join(ROLES)}")
        turns.append(Message(ROLES[role.lower()], text_of(item.get("content", item.get("value")), f"{name}[{number}]")))
    return tuple(turns)


def column(value: Mapping[str, Any], filters: Filters, meaning: str, *names: str) -> Any:
    """A row's entry of the given meaning: under the column that data.columns names for it, else the first of `names` (in any
    case) that the row has; None without one. Raises DataError where a named column is missing."""
    chosen = filters.columns.get(meaning)
    if chosen is not None:
        if chosen not in value:
            raise DataError(f"no column {chosen!r} (data.columns.{meaning}); the row has {', '.join(map(str, value))}")
        return value[chosen]
    lower = {str(key).lower(): entry for key, entry in value.items()}
    return next((lower[name] for name in names if lower.get(name) is not None), None)


def has(value: Any, *columns: str) -> bool:
    """Whether a row is a mapping with all of these columns, in any case."""
    return isinstance(value, Mapping) and set(columns) <= {str(key).lower() for key in value}


def digest(text: str) -> str:
    """A short stable name of a text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def as_prompt(value: Any, name: str) -> tuple[Message, ...]:
    """A prompt given as text (one user turn) or as messages that end in a user turn. Raises DataError."""
    turns = (Message("user", text_of(value, name)),) if isinstance(value, str) else messages_of(value, name)
    if turns[-1].role != "user":
        raise DataError(f"`{name}` ends in a turn of the {turns[-1].role}")
    return turns


def as_reply(value: Any, name: str) -> str:
    """A reply given as text or as a list with one assistant message. Raises DataError."""
    if isinstance(value, str) or value is None:
        return text_of(value, name)
    turns = messages_of(value, name)
    if len(turns) != 1 or turns[0].role != "assistant":
        raise DataError(f"`{name}` is no single assistant message")
    return turns[0].content


def _name(messages: Sequence[Message]) -> str:
    return digest("\0".join(f"{message.role}:{message.content}" for message in messages))
