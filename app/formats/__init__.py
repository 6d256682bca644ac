"""Data formats: one module each, named in one dict."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from app.formats import hh, instruction, messages, oasst, preference, prompts, ranking, text
from app.formats.records import Format

FORMATS: dict[str, Format] = {
    "oasst": oasst.FORMAT,
    "hh": hh.FORMAT,
    "ranking": ranking.FORMAT,
    "preference": preference.FORMAT,
    "messages": messages.FORMAT,
    "instruction": instruction.FORMAT,
    "prompts": prompts.FORMAT,
    "text": text.FORMAT,
}


FORMAT_OF_MEANING = {
    "chosen": "preference",
    "rejected": "preference",
    "responses": "ranking",
    "prefixes": "ranking",
    "messages": "messages",
    "response": "instruction",
    "input": "instruction",
    "context": "instruction",
    "prompt": "prompts",
    "text": "text",
}


def detect_format(value: Any) -> str | None:
    """Name of the first format that recognises a decoded row, or None. The narrower formats stand first."""
    return next((name for name, data_format in FORMATS.items() if data_format.matches(value)), None)


def format_of_columns(meanings: Iterable[str]) -> str | None:
    """The format whose rows have columns of these meanings (see data.columns); None without any."""
    given = set(meanings)
    return next((name for meaning, name in FORMAT_OF_MEANING.items() if meaning in given), None)
