"""Ranked lists: `prefixes` (the turns of a conversation, the user's first) and `responses`, best first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from app.errors import DataError
from app.formats.records import Filters, Message, TreeRecords
from app.formats.standalone import as_prompt, column, conversation, has, standalone, text_of


def _matches(value: Any) -> bool:
    return has(value, "responses") and (has(value, "prefixes") or has(value, "prompt"))


def _texts(value: Any, name: str) -> tuple[str, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise DataError(f"`{name}` is no list of texts")
    return tuple(text_of(item, f"{name}[{number}]") for number, item in enumerate(value, 1))


def _parse(value: Any, filters: Filters) -> TreeRecords:
    """Turns of `prefixes` belong to user and assistant in turn. A ranked list is no SFT sample: its best reply may be a poor one."""
    prefixes = column(value, filters, "prefixes", "prefixes")
    if prefixes is None:
        turns = as_prompt(column(value, filters, "prompt", "prompt"), "prompt")
    else:
        turns = tuple(Message("assistant" if k % 2 else "user", text) for k, text in enumerate(_texts(prefixes, "prefixes")))
    if not turns or turns[-1].role != "user":
        raise DataError("`prefixes` do not end in a turn of the user")
    return conversation(turns, group=_texts(column(value, filters, "responses", "responses"), "responses"))


FORMAT = standalone(_matches, _parse, "an object with `prefixes` and ranked `responses`")
