"""Formats whose rows stand alone: each row is one conversation, and nothing in it points to another row."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from app.errors import DataError
from app.formats.columns import columns_of, look_up
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
    set_aside,
)
from app.formats.screening import check_length, phrase_in

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
_TURN = re.compile(rf"(?:^|\n)[ \t]*<?({'|'.join(ROLES)})>?:[ \t]*", re.IGNORECASE)


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
                found = _screened(row, parse(row.value, filters), filters)
            except DataError as error:
                found = set_aside(row, str(error))
            except RecursionError:
                found = set_aside(row, "nested too deeply")
            yield found

    return Format(matches=matches, read=read)


def _could_be(value: Any, matches: Callable[[Any], bool], filters: Filters) -> bool:
    return matches(value) or bool(filters.columns and isinstance(value, Mapping))


def _screened(row: Row, records: TreeRecords, filters: Filters) -> TreeRecords | BadRow:
    """The records of a row, unless a message is too long or an answer to learn from holds one of the phrases."""
    check_length(records, filters.max_characters)
    phrases = (phrase_in(thread.messages, filters.phrases) for thread in records.threads)
    if phrase := next(filter(None, phrases), None):
        return set_aside(row, f"an answer holds {phrase!r} (data.phrases)", malformed=False)
    return records


def conversation(messages: Sequence[Message], *, group: Sequence[str] = (), augmented: Sequence[str] = ()) -> TreeRecords:
    """Records of one conversation: an SFT thread up to its last assistant turn, a prompt per user turn (with the answer to it, the
    best one of a group, as its reference) and, with `group`
    (replies, best first), the ranked group that answers the last user turn, with its generated worst replies (`augmented`).

    Raises DataError unless user and assistant turns alternate, after at most one leading system message.
    """
    turns = check_turns(messages)
    tree_id = digest(next(message.content for message in turns if message.role == "user"))
    replies = tuple(dict.fromkeys(group))
    if group and len(replies) < 2:
        raise DataError("all replies are the same: there is nothing to rank")
    prefix = turns if turns[-1].role == "user" else turns[:-1]
    last = len(turns) - next(k for k, message in enumerate(reversed(turns)) if message.role == "user")
    answers = {turns[:end]: turns[end].content if end < len(turns) else None for end in range(1, last + 1) if turns[end - 1].role == "user"}
    if replies:
        answers[prefix] = replies[0]
    thread = turns if turns[-1].role == "assistant" else turns[:-1]
    return TreeRecords(
        tree_id,
        messages=len(turns) + max(0, len(replies) - 1),
        threads=(Thread(_name(thread), tree_id, thread),) if any(message.role == "assistant" for message in thread) else (),
        groups=(RankedGroup(_name(prefix), tree_id, prefix, replies, augmented=tuple(augmented)),) if replies else (),
        prompts=tuple(PromptItem(_name(prompt), tree_id, prompt, reference=answers[prompt]) for prompt in sorted(answers, key=len)),
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
    """Messages given as a list of {"role", "content"} (or {"from", "value"}) mappings, as {"input", "output"} pairs, as texts of user
    and assistant in turn, or as one transcript with lines such as `User: ...` and `<bot>: ...`. Raises DataError."""
    if isinstance(value, str):
        return transcript(value, name)
    if not isinstance(value, Sequence) or not value:
        raise DataError(f"`{name}` is no list of messages")
    if all(isinstance(item, str) for item in value):
        return alternating(value, name)
    return tuple(message for number, item in enumerate(value, 1) for message in _message_or_pair(item, name, number))


def _message_or_pair(item: Any, name: str, number: int) -> Iterator[Message]:
    if not isinstance(item, Mapping):
        raise DataError(f"`{name}`: message {number} is no mapping")
    if "input" in item and "output" in item:
        yield Message("user", text_of(item["input"], f"{name}[{number}].input"))
        yield Message("assistant", text_of(item["output"], f"{name}[{number}].output"))
        return
    role = next((item[key] for key in ("role", "from") if item.get(key) is not None), None)
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise DataError(f"`{name}`: message {number} has the role {role!r}; known are {', '.join(ROLES)}")
    content = next((item[key] for key in ("content", "value") if item.get(key) is not None), None)
    yield Message(ROLES[role.lower()], text_of(content, f"{name}[{number}]"))


def alternating(value: Any, name: str) -> tuple[Message, ...]:
    """A list of texts that belong to user and assistant in turn. Raises DataError."""
    return tuple(Message("assistant" if number % 2 else "user", text) for number, text in enumerate(texts_of(value, name)))


def texts_of(value: Any, name: str) -> tuple[str, ...]:
    """A column that must hold a list of texts. Raises DataError."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise DataError(f"`{name}` is no list of texts")
    return tuple(text_of(item, f"{name}[{number}]") for number, item in enumerate(value, 1))


def transcript(text: str, name: str, turn: re.Pattern[str] = _TURN) -> tuple[Message, ...]:
    """The turns of a transcript, split where `turn` finds a speaker (its group 1, a name in ROLES); paragraphs of one speaker that
    follow each other are joined. Raises DataError."""
    pieces = turn.split(text_of(text, name))
    if pieces[0].strip():
        raise DataError(f"`{name}` does not begin with a turn")
    paragraphs: list[tuple[MessageRole, list[str]]] = []
    for speaker, words in zip(pieces[1::2], pieces[2::2], strict=True):
        role = ROLES[speaker.lower()]
        if not paragraphs or paragraphs[-1][0] != role:
            paragraphs.append((role, []))
        paragraphs[-1][1].append(words.strip())
    turns = [Message(role, "\n\n".join(words).strip()) for role, words in paragraphs]
    if empty := next((number for number, turn in enumerate(turns, 1) if not turn.content), None):
        raise DataError(f"`{name}`: turn {empty} is empty")
    return tuple(turns)


def column(value: Mapping[str, Any], filters: Filters, meaning: str, *names: str) -> Any:
    """A row's entry of the given meaning: what `data.columns` names for it (see `look_up`), else the first of `names` (in any case)
    that the row has and that has no other meaning; None without one. Raises DataError where a named column is missing."""
    chosen = filters.columns.get(meaning)
    if chosen is not None:
        try:
            return look_up(value, chosen)
        except DataError as error:
            raise DataError(f"data.columns.{meaning}: {error}") from error
    taken = frozenset[str]().union(*map(columns_of, filters.columns.values()))
    lower = {str(key).lower(): entry for key, entry in value.items() if key not in taken}
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
