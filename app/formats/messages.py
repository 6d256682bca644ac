"""Chat conversations: `messages` with role and content, or `conversations` with from and value."""

from __future__ import annotations

from typing import Any

from app.formats.records import Filters, TreeRecords
from app.formats.standalone import column, conversation, has, messages_of, standalone


def _matches(value: Any) -> bool:
    return has(value, "messages") or has(value, "conversations")


def _parse(value: Any, filters: Filters) -> TreeRecords:
    return conversation(messages_of(column(value, filters, "messages", "messages", "conversations"), "messages"))


FORMAT = standalone(_matches, _parse, "an object with a list of `messages`")
