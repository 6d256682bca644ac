"""Preference pairs: `chosen` and `rejected` answers to a `prompt`, as texts or as lists of messages."""

from __future__ import annotations

from typing import Any

from app.errors import DataError
from app.formats.records import Filters, Message, TreeRecords
from app.formats.standalone import as_prompt, as_reply, column, conversation, has, messages_of, standalone


def _matches(value: Any) -> bool:
    return has(value, "chosen", "rejected") and (
        has(value, "prompt") or all(isinstance(value.get(k), list) for k in ("chosen", "rejected"))
    )


def _parse(value: Any, filters: Filters) -> TreeRecords:
    """Without a prompt, both lists of messages hold the whole conversation and differ in its last answer."""
    prompt = column(value, filters, "prompt", "prompt", "question", "instruction")
    chosen, rejected = (column(value, filters, name, name) for name in ("chosen", "rejected"))
    if prompt is None or (isinstance(chosen, list) and len(chosen) > 1):
        better, worse = messages_of(chosen, "chosen"), messages_of(rejected, "rejected")
        if better[:-1] != worse[:-1]:
            raise DataError("`chosen` and `rejected` differ before their last answer")
        if len(better) < 2 or better[-1].role != "assistant" or worse[-1].role != "assistant":
            raise DataError("`chosen` and `rejected` do not end in an answer of the assistant")
        return conversation(better, group=(better[-1].content, worse[-1].content))
    replies = (as_reply(chosen, "chosen"), as_reply(rejected, "rejected"))
    return conversation((*as_prompt(prompt, "prompt"), Message("assistant", replies[0])), group=replies)


FORMAT = standalone(_matches, _parse, "an object with `prompt`, `chosen` and `rejected`")
