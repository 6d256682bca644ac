"""Anthropic HH transcripts: `chosen` and `rejected` share a conversation and differ in its last answer."""

from __future__ import annotations

import re
from typing import Any

from app.errors import DataError
from app.formats.records import Filters, Message, TreeRecords
from app.formats.standalone import ROLES, conversation, has, standalone, text_of

_TURN = re.compile(r"\n\n(Human|Assistant):")


def _matches(value: Any) -> bool:
    return has(value, "chosen", "rejected") and all(
        isinstance(value.get(name), str) and value[name].startswith("\n\nHuman:") for name in ("chosen", "rejected")
    )


def transcript(text: str, name: str) -> tuple[Message, ...]:
    """The turns of a transcript; paragraphs of one speaker that follow each other are joined. Raises DataError."""
    pieces = _TURN.split(text_of(text, name))
    if pieces[0].strip():
        raise DataError(f"`{name}` does not begin with a turn")
    turns: list[Message] = []
    for speaker, words in zip(pieces[1::2], pieces[2::2], strict=True):
        role, content = ROLES[speaker.lower()], words.strip()
        if turns and turns[-1].role == role:
            turns[-1] = Message(role, f"{turns[-1].content}\n\n{content}".strip())
        else:
            turns.append(Message(role, content))
    if len(turns) < 2 or turns[-1].role != "assistant":
        raise DataError(f"`{name}` does not end in an answer of the assistant")
    if empty := next((number for number, turn in enumerate(turns, 1) if not turn.content), None):
        raise DataError(f"`{name}`: turn {empty} is empty")
    return tuple(turns)


def _parse(value: Any, filters: Filters) -> TreeRecords:
    chosen, rejected = (transcript(value[name], name) for name in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise DataError("`chosen` and `rejected` differ before their last answer")
    return conversation(chosen, group=(chosen[-1].content, rejected[-1].content))


FORMAT = standalone(_matches, _parse, "an object with `chosen` and `rejected` transcripts that begin with '\\n\\nHuman:'")
