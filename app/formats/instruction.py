"""One prompt and one response a row, under the usual column names or those in `data.columns`."""

from __future__ import annotations

from typing import Any

from app.formats.records import Filters, Labels, Message, TreeRecords
from app.formats.standalone import as_prompt, column, conversation, has, standalone, text_of

PAIRS = (("instruction", "response"), ("instruction", "output"), ("prompt", "response"), ("prompt", "completion"), ("question", "answer"))
PROMPTS, RESPONSES = (tuple(dict.fromkeys(pair[side] for pair in PAIRS)) for side in (0, 1))


def _matches(value: Any) -> bool:
    return any(has(value, *pair) for pair in PAIRS)


def _parse(value: Any, filters: Filters) -> TreeRecords:
    """An `input` beside an instruction (Alpaca's column) follows it after an empty line; a `system` message
    leads; what the response builds on, its `context`, is told in system tags alone (data.system_tags)."""
    prompt = as_prompt(column(value, filters, "prompt", *PROMPTS), "prompt")
    extra = column(value, filters, "input", "input")
    if isinstance(extra, str) and extra.strip():
        prompt = (*prompt[:-1], Message("user", f"{prompt[-1].content}\n\n{text_of(extra, 'input')}"))
    system = column(value, filters, "system", "system", "system_prompt", "system_message")
    if isinstance(system, str) and system.strip():
        prompt = (Message("system", text_of(system, "system")), *prompt)
    response = text_of(column(value, filters, "response", *RESPONSES), "response")
    context = column(value, filters, "context", "context")
    labels = Labels(context=text_of(context, "context")) if isinstance(context, str) and context.strip() else None
    return conversation((*prompt, Message("assistant", response, labels)))


FORMAT = standalone(_matches, _parse, f"an object with a prompt and a response ({', '.join('/'.join(pair) for pair in PAIRS)})")
