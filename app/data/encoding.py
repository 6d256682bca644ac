"""From conversations to token rows: what each stage is given of a thread, a ranked group or a prompt, and what is cut."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from app.data.templates import Template
from app.data.token_cache import GroupRow, SftRow
from app.experience import IntArray, Prompt
from app.formats.records import PromptItem, RankedGroup, Thread

PROMPT_SHARE = 4
"""An over-long reply leaves at least 1 / PROMPT_SHARE of a sequence to the newest tokens of its prompt."""


def encode_threads(items: Iterable[Thread], template: Template, max_length: int) -> Iterator[SftRow]:
    """The first `max_length` tokens of each thread; threads with no assistant token among them are left out."""
    for thread in items:
        ids, mask = template.encode(thread.messages, open_assistant=False)
        if any(mask[:max_length]):
            yield SftRow(np.array(ids[:max_length], np.int32), np.array(mask[:max_length], np.bool_), thread.dataset)


def encode_groups(items: Iterable[RankedGroup], template: Template, max_length: int) -> Iterator[GroupRow]:
    """Every reply behind its prompt, at most `max_length` tokens: the prompt loses its oldest tokens, an over-long reply its last
    ones, the end token always stays (a reward model reads its score there)."""
    for group in items:
        prompt, _ = template.encode(group.prefix, open_assistant=True)
        sequences = tuple(join_reply(prompt, template.encode_text(reply), template.eos_id, max_length) for reply in group.replies)
        yield GroupRow(group.id, sequences, group.dataset)


def encode_prompts(items: Iterable[PromptItem], template: Template, max_length: int) -> list[Prompt]:
    """Conversations that end in an open assistant turn; over-long ones lose their oldest tokens."""
    prompts = []
    for item in items:
        ids, _ = template.encode(item.messages, open_assistant=True)
        messages = tuple(message.as_dict() for message in item.messages)
        prompts.append(Prompt(item.id, item.messages[-1].content, np.array(ids[-max_length:], np.int32), messages))
    return prompts


def join_reply(prompt: Sequence[int], reply: Sequence[int], eos_id: int, max_length: int) -> IntArray:
    """prompt + reply + end token, int32 [S <= max_length], cut as `encode_groups` says."""
    reserved = min(len(prompt), max_length // PROMPT_SHARE)
    kept = list(reply[: max_length - 1 - reserved])
    room = max_length - 1 - len(kept)
    return np.array([*prompt[max(0, len(prompt) - room) :], *kept, eos_id], np.int32)
