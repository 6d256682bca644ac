"""Anthropic HH transcripts: `chosen` and `rejected` share a conversation and differ in its last answer."""

from __future__ import annotations

import re
from typing import Any

from app.errors import DataError
from app.formats.records import Filters, Message, TreeRecords
from app.formats.standalone import column, conversation, has, standalone, text_of, transcript

_TURN = re.compile(r"\n\n(Human|Assistant):")


def _matches(value: Any) -> bool:
    return has(value, "chosen", "rejected") and all(
        isinstance(value.get(name), str) and value[name].startswith("\n\nHuman:") for name in ("chosen", "rejected")
    )


def _turns(text: Any, name: str) -> tuple[Message, ...]:
    turns = transcript(text_of(text, name), name, _TURN)
    if len(turns) < 2 or turns[-1].role != "assistant":
        raise DataError(f"`{name}` does not end in an answer of the assistant")
    return turns


def _parse(value: Any, filters: Filters) -> TreeRecords:
    chosen, rejected = (_turns(column(value, filters, name, name), name) for name in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise DataError("`chosen` and `rejected` differ before their last answer")
    return conversation(chosen, group=(chosen[-1].content, rejected[-1].content))


FORMAT = standalone(_matches, _parse, "an object with `chosen` and `rejected` transcripts that begin with '\\n\\nHuman:'")
