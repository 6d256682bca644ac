"""Phrases that no answer should be learnt with, and the check of records against them and against the longest message allowed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from app.errors import DataError
from app.formats.records import Message, TreeRecords

PHRASES: dict[str, tuple[str, ...]] = {
    "refusals": (
        "as an ai language model",
        "as a language model",
        "as a large language model",
        "as an ai assistant",
        "as an artificial intelligence",
        "i'm an ai",
        "i am an ai",
        "i'm just an ai",
        "i'm only a language model",
        "i'm a language model",
        "i am a language model",
        "i am only a computer program",
        "my training data",
        "my knowledge cutoff",
        "i was trained by openai",
        "developed by openai",
        "i do not have personal opinions",
        "i don't have personal opinions",
        "i do not have feelings",
        "i don't have feelings or emotions",
        "i cannot browse the internet",
        "i do not have access to real-time",
        "i don't have access to real-time",
        "i'm sorry, but i can't assist",
        "i'm sorry, but i cannot fulfill",
        "i cannot comply with",
        "i'm not able to help with that request",
    )
}
"""Lists that `data.phrases` can name."""


def phrases_of(names: Iterable[str]) -> tuple[str, ...]:
    """The phrases that `data.phrases` gives: a name of PHRASES stands for its list, anything else for itself.

    >>> phrases_of(["Call me", "refusals"])[:2]
    ('call me', 'as an ai language model')
    """
    return tuple(dict.fromkeys(_plain(phrase) for name in names for phrase in PHRASES.get(name, (name,))))


def phrase_in(messages: Sequence[Message], phrases: Sequence[str]) -> str | None:
    """The first of `phrases` (as `phrases_of` gives them) in the assistant's messages, letter case and shape of apostrophes aside."""
    if not phrases:
        return None
    texts = [_plain(message.content) for message in messages if message.role == "assistant"]
    return next((phrase for phrase in phrases if any(phrase in text for text in texts)), None)


def check_length(records: TreeRecords, limit: int) -> None:
    """Raises DataError where a message or reply is longer than `limit` characters."""
    if (longest := max(map(len, _texts(records)), default=0)) > limit:
        raise DataError(f"a message has {longest} characters, and data.max_characters is {limit}")


def _texts(records: TreeRecords) -> Iterator[str]:
    threads, prompts = ([item.messages for item in items] for items in (records.threads, records.prompts))
    yield from (message.content for messages in (*threads, *prompts) for message in messages)
    for group in records.groups:
        yield from (message.content for message in group.prefix)
        yield from group.replies
        yield from group.augmented


def _plain(text: str) -> str:
    return text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'").casefold()
