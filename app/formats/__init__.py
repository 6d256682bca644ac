"""Data formats: one module each, named in one dict."""

from __future__ import annotations

from typing import Any

from app.formats import oasst, prompts
from app.formats.records import Format

FORMATS: dict[str, Format] = {
    "oasst": oasst.FORMAT,
    "prompts": prompts.FORMAT,
}


def detect_format(value: Any) -> str | None:
    """Name of the first format that recognises a decoded row, or None."""
    return next((name for name, data_format in FORMATS.items() if data_format.matches(value)), None)
