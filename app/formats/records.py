"""What every data format is turned into, and the shape of a format."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

_SURROGATE = re.compile("[\ud800-\udfff]")

MessageRole = Literal["system", "user", "assistant", "text"]
"""`text` is a passage of raw text, which stands alone: no turn of a conversation, written without any markup."""


@dataclass(frozen=True)
class Labels:
    """What people said of a message, averaged, 0 to 1; None where nobody did. lang: its language; context: what it builds on."""

    lang: str | None = None
    quality: float | None = None
    humor: float | None = None
    creativity: float | None = None
    context: str | None = None


@dataclass(frozen=True)
class Message:
    role: MessageRole
    content: str
    labels: Labels | None = None

    @classmethod
    def of(cls, mapping: Mapping[str, str]) -> Message:
        """From what `as_dict` gives."""
        return cls(cast(MessageRole, mapping["role"]), mapping["content"])

    def as_dict(self) -> dict[str, str]:
        """The mapping that chat templates take."""
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True)
class Thread:
    """A conversation that ends in an assistant turn, or one raw text: one SFT sample. dataset: the set of `data.sets` that it is from."""

    id: str
    tree_id: str
    messages: tuple[Message, ...]
    dataset: str = ""


@dataclass(frozen=True)
class RankedGroup:
    """A conversation that ends in a user turn, and at least two replies to it, best first.

    gold: hidden scores of the replies, only on the embedded task; never used by training.
    augmented: generated replies, each worse than all others; training may append one of them (`with_worst_reply`).
    reply_labels: of the replies in their order; none of those beyond its end.
    """

    id: str
    tree_id: str
    prefix: tuple[Message, ...]
    replies: tuple[str, ...]
    gold: tuple[float, ...] | None = None
    dataset: str = ""
    augmented: tuple[str, ...] = ()
    reply_labels: tuple[Labels | None, ...] = ()

    @property
    def pairs(self) -> int:
        """Ordered pairs (better, worse)."""
        return len(self.replies) * (len(self.replies) - 1) // 2


@dataclass(frozen=True)
class PromptItem:
    """A conversation that ends in a user turn: what PPO answers.

    reference: a good answer, where the data has one: the best of ranked replies, or the turn that followed.
    """

    id: str
    tree_id: str
    messages: tuple[Message, ...]
    dataset: str = ""
    reference: str | None = None


@dataclass(frozen=True)
class TreeRecords:
    """What a row gives; all records of one tree, whichever rows they come from, stay on one side of the train/validation split.

    messages: how many messages the tree has, filtered ones included; lang: of its first message, where the data says so.
    """

    tree_id: str
    messages: int
    threads: tuple[Thread, ...] = ()
    groups: tuple[RankedGroup, ...] = ()
    prompts: tuple[PromptItem, ...] = ()
    lang: str | None = None


def fault_of(text: str) -> str | None:
    """Why a text cannot be trained on, for a message about it; None where it can.

    >>> fault_of(chr(0)), fault_of(chr(0xD83D)), fault_of("Why?")
    ('holds a NUL byte', 'holds half a character (a lone surrogate)', None)
    """
    if "\0" in text:
        return "holds a NUL byte"
    return "holds half a character (a lone surrogate)" if _SURROGATE.search(text) else None


def is_usable(text: str) -> bool:
    """Whether a text is fit for a row: it says something, and has no fault.

    >>> is_usable("Why?"), is_usable(" "), is_usable(chr(0) + "Why?")
    (True, False, False)
    """
    return bool(text.strip()) and fault_of(text) is None


@dataclass(frozen=True)
class Row:
    """One decoded row: where it stood (`line` counts from 1) and its raw text."""

    file: str
    line: int
    text: str
    value: Any


@dataclass(frozen=True)
class BadRow:
    """A row that is not used, and why. malformed: False where an option asked to leave it out; `data.strict` does not stop at those."""

    file: str
    line: int
    text: str
    reason: str
    malformed: bool = True


STORED = 2_000
"""Characters that are kept of the text of a row that is set aside."""


def set_aside(row: Row, reason: str, *, malformed: bool = True) -> BadRow:
    """The row with the reason why it is not used; its text is cut, so that one row of 10 MB does not fill the quarantine file."""
    text = row.text if len(row.text) <= STORED else f"{row.text[:STORED]}... ({len(row.text)} characters)"
    return BadRow(row.file, row.line, _writable(text), _writable(reason[:STORED]), malformed)


def _writable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


@dataclass(frozen=True)
class Filters:
    """lang: languages of the root prompt to keep (empty: all); top_k: SFT keeps assistant messages ranked below this;
    columns: meaning (prompt, response, chosen, ...) -> column or columns of the row, for formats with free column names;
    phrases: no answer that SFT learns may hold one of them (see `app.formats.screening`); max_characters: of one message."""

    lang: tuple[str, ...] = ()
    top_k: int | None = None
    columns: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    phrases: tuple[str, ...] = ()
    max_characters: int = 1_000_000


@dataclass(frozen=True)
class Format:
    """A data format. `matches` looks at one decoded row; `read` turns rows, as they come, into records and rows that it cannot use."""

    matches: Callable[[Any], bool]
    read: Callable[[Iterable[Row], Filters], Iterator[TreeRecords | BadRow]]
