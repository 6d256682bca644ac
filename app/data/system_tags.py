"""System tags: before an answer, a system message tells what the answer will be like, so that a model can be asked for it.

The content is Open-Assistant's: lines of `key: value` in a random order, `context` last, each left out by chance, and a line
break at the end. The draws depend on the seed, the record and the turn alone: the same data gives the same tokens in any order
and on any machine, and a record keeps its draw through all epochs.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from app.formats.records import Labels, Message

LENGTH_UNIT = 5
"""`length` counts words in this unit, from 1."""
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class SystemTags:
    """properties: what may be told (of lang, quality, humor, creativity, length, context), none at all without one;
    dropout: chance of each to be left out."""

    properties: tuple[str, ...]
    dropout: float
    seed: int

    def insert(self, record: str, messages: Sequence[Message]) -> tuple[Message, ...]:
        """The messages with a tag before each assistant turn, where one has anything left to tell."""
        out: list[Message] = []
        for turn, message in enumerate(messages):
            if message.role == "assistant":
                out += self.before(record, turn, message)
            out.append(message)
        return tuple(out)

    def before(self, record: str, turn: int, answer: Message) -> tuple[Message, ...]:
        """The tag of one answer as a system message; empty where nothing is known of it or nothing was kept."""
        draw = random.Random(f"{self.seed}/{turn}/{record}")
        told = {key: value for key, value in _known(answer).items() if key in self.properties}
        keys = [key for key in told if key != "context"]
        draw.shuffle(keys)
        keys += [key for key in told if key == "context"]  # it may have several lines
        lines = [f"{key}: {told[key]}" for key in keys if draw.random() >= self.dropout]
        return (Message("system", "\n".join(lines) + "\n"),) if lines else ()


def _known(answer: Message) -> dict[str, str]:
    """What is known of an answer, as it is told."""
    labels = answer.labels or Labels()
    texts = {"lang": labels.lang, "context": labels.context}
    shares = {"quality": labels.quality, "humor": labels.humor, "creativity": labels.creativity}
    return {
        **{key: text for key, text in texts.items() if text and text.strip()},
        **{key: f"{share:.1f}" for key, share in shares.items() if share is not None},
        "length": str(len(_WORD.findall(answer.content)) // LENGTH_UNIT + 1),
    }
