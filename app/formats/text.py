"""Raw text, a passage a row: trained on as it stands by SFT; it has no prompt for a reward model or PPO."""

from __future__ import annotations

from typing import Any

from app.formats.instruction import PROMPTS, RESPONSES
from app.formats.records import Filters, Message, Thread, TreeRecords
from app.formats.standalone import column, digest, has, standalone, text_of

OTHERS = (*PROMPTS, *RESPONSES, "chosen", "rejected", "prefixes", "responses", "messages", "conversations")
"""Columns of conversations: beside one of them a `text` is something else."""


def _matches(value: Any) -> bool:
    return has(value, "text") and not any(has(value, name) for name in OTHERS)


def _parse(value: Any, filters: Filters) -> TreeRecords:
    text = text_of(column(value, filters, "text", "text"), "text")
    name = digest(text)
    return TreeRecords(name, messages=1, threads=(Thread(name, name, (Message("text", text),)),))


FORMAT = standalone(_matches, _parse, "an object with a `text` and no conversation")
