"""From conversations to token rows: what each stage is given of a thread, a ranked group or a prompt, and what is cut.

Everything drawn here depends on the seed and the record alone, and is drawn once: a record is the same row in every epoch.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest

import numpy as np

from app.config.data import DataConfig
from app.data.system_tags import SystemTags
from app.data.templates import Template
from app.data.token_cache import BoolArray, GroupRow, SftRow
from app.errors import ConfigError
from app.experience import IntArray, Prompt
from app.formats.records import Message, PromptItem, RankedGroup, Thread

PROMPT_SHARE = 4
"""An over-long reply leaves at least 1 / PROMPT_SHARE of a sequence to the newest tokens of its prompt."""
LEAST_ROOM = 4
"""Tokens that `data.system_prefix` must leave."""


@dataclass
class Cuts:
    """Counted while rows are taken from an encoder. truncated: rows that lost tokens; left_out: records that gave no row."""

    truncated: int = 0
    left_out: int = 0

    def as_dict(self) -> dict[str, int]:
        """For a stage's results."""
        return asdict(self)


def encode_threads(items: Iterable[Thread], template: Template, config: DataConfig, seed: int, cuts: Cuts) -> Iterator[SftRow]:
    """Each thread as a row of at most `data.max_length` tokens, cut by `data.overlong`; the first token of what is kept is no target.

    A head that ends within a turn has no end token: the model must not learn to stop there. Threads without a target in what is
    kept are left out; a stretch is drawn among those that hold one.
    """
    prefix, room = _prefix_and_room(template, config, config.max_length)
    tags = SystemTags(config.system_tags, config.system_tag_dropout, seed)
    share = config.window_probability if config.overlong == "window" else 0.0
    for thread in items:
        ids, mask = template.encode(tags.insert(thread.id, thread.messages), open_assistant=False)
        targets = np.ones(len(ids), np.bool_) if config.train_on == "all" else np.array(mask, np.bool_)
        start = _start(targets, room, share, random.Random(f"{seed}/{thread.id}"))
        if start is None:
            cuts.left_out += 1
            continue
        cuts.truncated += len(ids) > room
        targets[start] = False
        loss_mask = np.concatenate([np.zeros(len(prefix), np.bool_), targets[start : start + room]])
        yield SftRow(np.array([*prefix, *ids[start : start + room]], np.int32), loss_mask, thread.dataset)


def _start(targets: BoolArray, room: int, window_share: float, draw: random.Random) -> int | None:
    """Where what is kept of a thread begins: at 0, or in `window_share` of the over-long ones at any place whose `room` tokens hold
    a target behind the first. None without such a place."""
    last = max(0, len(targets) - room)
    seen = np.cumsum(targets)
    fruitful = seen[np.minimum(np.arange(last + 1) + room, len(targets)) - 1] > seen[: last + 1]
    if last and draw.random() < window_share:
        places = np.flatnonzero(fruitful)
        return int(places[draw.randrange(len(places))]) if len(places) else None
    return 0 if fruitful[0] else None


def encode_groups(items: Iterable[RankedGroup], template: Template, config: DataConfig, seed: int, cuts: Cuts) -> Iterator[GroupRow]:
    """Every reply behind its prompt, at most `data.max_length` tokens: the prompt loses its oldest tokens, an over-long reply its last
    ones, the end token always stays (a reward model reads its score there). Groups whose replies the cut makes all the same are
    left out."""
    prefix, room = _prefix_and_room(template, config, config.max_length)
    tags = SystemTags(config.system_tags, config.system_tag_dropout, seed)
    for group in items:
        before = tags.insert(group.id, group.prefix)
        plain, _ = template.encode(before, open_assistant=True)
        sequences, longest = [], 0
        for number, (reply, labels) in enumerate(zip_longest(group.replies, group.reply_labels[: len(group.replies)])):
            tag = tags.before(group.id, len(group.prefix) + number, Message("assistant", reply, labels))
            prompt = template.encode((*before, *tag), open_assistant=True)[0] if tag else plain
            answer = template.encode_text(reply)
            longest = max(longest, len(prompt) + len(answer) + 1)
            sequences.append(np.concatenate([prefix, join_reply(prompt, answer, [template.eos_id], room)]))
        if all(np.array_equal(sequence, sequences[0]) for sequence in sequences):
            cuts.left_out += 1
            continue
        cuts.truncated += longest > room
        yield GroupRow(group.id, tuple(sequences), group.dataset)


def encode_prompts(
    items: Iterable[PromptItem], template: Template, config: DataConfig, cuts: Cuts, *, references: bool = False
) -> Iterator[Prompt]:
    """Conversations that end in an open assistant turn, of at most `data.max_prompt_length` tokens; over-long ones lose their oldest.
    They have no system tags: nothing is known of an answer that is to come.

    references: with the reference answers of those that have one, cut so that prompt and answer have at most `data.max_length`."""
    prefix, room = _prefix_and_room(template, config, config.max_prompt_length)
    for item in items:
        ids, _ = template.encode(item.messages, open_assistant=True)
        cuts.truncated += len(ids) > room
        messages = tuple(message.as_dict() for message in item.messages)
        prompt = np.array([*prefix, *ids[-room:]], np.int32)
        answer = None
        if references and item.reference is not None:
            answer = join_reply([], template.encode_text(item.reference), [template.eos_id], max(1, config.max_length - len(prompt)))
        yield Prompt(item.id, item.messages[-1].content, prompt, messages, answer)


def join_reply(prompt: Sequence[int], reply: Sequence[int], ending: Sequence[int], max_length: int) -> IntArray:
    """prompt + reply + ending (of a finished reply its end token), int32 [S <= max_length], cut as `encode_groups` says."""
    kept = list(reply[: kept_of_reply(prompt, reply, ending, max_length)])
    room = max_length - len(ending) - len(kept)
    return np.array([*prompt[max(0, len(prompt) - room) :], *kept, *ending], np.int32)


def kept_of_reply(prompt: Sequence[int], reply: Sequence[int], ending: Sequence[int], max_length: int) -> int:
    """How many of a reply's own tokens `join_reply` keeps."""
    reserved = min(len(prompt), max_length // PROMPT_SHARE)
    return min(len(reply), max_length - len(ending) - reserved)


def check_system_options(template: Template, config: DataConfig) -> None:
    """Raises ConfigError where the template cannot write `data.system_tags` or `data.system_prefix`, or the prefix leaves no room."""
    if template.name != "oasst" and (config.system_tags or config.system_prefix):
        name = "data.system_tags" if config.system_tags else "data.system_prefix"
        raise ConfigError(
            f"{name}: written in Open-Assistant's roles, and this model has a chat template of its own: set data.template = 'oasst', "
            "or give the rows a system message of their own"
        )
    for key, limit in (("data.max_length", config.max_length), ("data.max_prompt_length", config.max_prompt_length)):
        if _prefix_and_room(template, config, limit)[1] < LEAST_ROOM:
            raise ConfigError(f"data.system_prefix leaves fewer than {LEAST_ROOM} of {key} = {limit} tokens: shorten it, or raise {key}")


def _prefix_and_room(template: Template, config: DataConfig, limit: int) -> tuple[IntArray, int]:
    """The tokens of `data.system_prefix`, int32 [P], and how many of `limit` it leaves."""
    if not config.system_prefix:
        return np.array([], np.int32), limit
    ids, _ = template.encode([Message("system", config.system_prefix)], open_assistant=False)
    return np.array(ids, np.int32), limit - len(ids)
