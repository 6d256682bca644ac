"""Prompts alone: a JSON string a line, or an object with nothing but a prompt. They serve PPO; SFT and reward models find nothing
to train on."""

from __future__ import annotations

from typing import Any

from app.errors import DataError
from app.formats.instruction import PROMPTS, RESPONSES
from app.formats.records import Filters, Message, TreeRecords
from app.formats.standalone import as_prompt, column, conversation, has, standalone, text_of


def _matches(value: Any) -> bool:
    others = (*RESPONSES, "chosen", "rejected", "responses", "messages")
    return isinstance(value, str) or (any(has(value, name) for name in PROMPTS) and not any(has(value, name) for name in others))


def _parse(value: Any, filters: Filters) -> TreeRecords:
    if isinstance(value, str):
        return conversation((Message("user", text_of(value, "prompt")),))
    prompt = column(value, filters, "prompt", *PROMPTS)
    if prompt is None:
        raise DataError("the row has no prompt; name its column in data.columns.prompt")
    return conversation(as_prompt(prompt, "prompt"))


FORMAT = standalone(_matches, _parse, "a JSON string or an object with a `prompt`")
