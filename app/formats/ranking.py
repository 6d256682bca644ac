"""Ranked lists: `prefixes` (the turns of a conversation, the user's first) or a `prompt`, and `responses`, best first or ranked by
`scores` or by the position of the `best`; `augmented` holds generated replies that are worse than all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from app.errors import DataError
from app.formats.records import Filters, TreeRecords
from app.formats.standalone import alternating, as_prompt, column, conversation, digest, has, standalone, texts_of


def _matches(value: Any) -> bool:
    return has(value, "responses") and (has(value, "prefixes") or has(value, "prompt"))


def _parse(value: Any, filters: Filters) -> TreeRecords:
    """Turns of `prefixes` belong to user and assistant in turn. A ranked list is no SFT sample: its best reply may be a poor one."""
    prefixes = column(value, filters, "prefixes", "prefixes")
    turns = as_prompt(column(value, filters, "prompt", "prompt"), "prompt") if prefixes is None else alternating(prefixes, "prefixes")
    if not turns or turns[-1].role != "user":
        raise DataError("`prefixes` do not end in a turn of the user")
    replies = texts_of(column(value, filters, "responses", "responses"), "responses")
    scores, best = column(value, filters, "scores", "scores"), column(value, filters, "best", "best")
    if scores is not None:
        replies = _by_score(replies, scores)
    elif best is not None:
        replies = _best_and_another(replies, best)
    augmented = column(value, filters, "augmented", "augmented")
    return conversation(turns, group=replies, augmented=() if augmented is None else texts_of(augmented, "augmented"))


def _by_score(replies: Sequence[str], scores: Any) -> tuple[str, ...]:
    """Highest score first; of replies with one score, which are not ranked among each other, the first stays."""
    if not isinstance(scores, list) or len(scores) != len(replies) or not all(map(_is_number, scores)):
        raise DataError(f"`scores` does not hold one number for each of {len(replies)} replies")
    first: dict[float, str] = {}
    for score, reply in zip(scores, replies, strict=True):
        first.setdefault(score, reply)
    if len(first) < 2:
        raise DataError("all replies have one score: there is nothing to rank")
    return tuple(first[score] for score in sorted(first, reverse=True))


def _best_and_another(replies: Sequence[str], best: Any) -> tuple[str, ...]:
    """The best reply, by its position from 0, and one of the others, which are not ranked among each other: drawn, but always the same."""
    place = int(best) if isinstance(best, str) and best.isdecimal() and len(best) < 9 else best
    if isinstance(place, bool) or not isinstance(place, int) or not 0 <= place < len(replies):
        raise DataError(f"`best` is {best!r}, not the position of one of {len(replies)} replies, from 0")
    others = [reply for number, reply in enumerate(replies) if number != place]
    return (replies[place], others[int(digest("\0".join(replies)), 16) % len(others)]) if others else tuple(replies)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


FORMAT = standalone(_matches, _parse, "an object with `prefixes` and ranked `responses`")
