"""Chat conversations: `messages` with role and content, or `conversations` with from and value; also texts in turn, and transcripts."""

from __future__ import annotations

from typing import Any

from app.formats.records import Filters, Message, TreeRecords
from app.formats.standalone import column, conversation, has, messages_of, standalone, text_of


def _matches(value: Any) -> bool:
    return has(value, "messages") or has(value, "conversations")


def _parse(value: Any, filters: Filters) -> TreeRecords:
    """A `system` column leads a conversation that has no system message of its own."""
    messages = messages_of(column(value, filters, "messages", "messages", "conversations"), "messages")
    system = column(value, filters, "system", "system", "system_prompt", "system_message")
    if isinstance(system, str) and system.strip() and messages[0].role != "system":
        messages = (Message("system", text_of(system, "system")), *messages)
    return conversation(messages)


FORMAT = standalone(_matches, _parse, "an object with a list of `messages`")
