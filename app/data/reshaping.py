"""What is made of records once they are on their side of the split: pure functions of the records and a seed."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import groupby, islice

from app.config.data import SetConfig
from app.formats.records import Message, RankedGroup, Thread

CHAIN_WINDOW = 4096
"""Threads that are shuffled together before they are chained."""


def with_worst_reply(group: RankedGroup, seed: int) -> RankedGroup:
    """The group with one of its generated replies behind its own, as the worst of all; for the training side. Which one depends on
    the seed and the group's id alone. A group without generated replies, or with none that differs from its own, stays as it is."""
    worse = [reply for reply in group.augmented if reply not in group.replies]
    if not worse:
        return group
    drawn = int.from_bytes(hashlib.sha256(f"{seed}:{group.id}".encode()).digest()[:8], "big")
    return replace(group, replies=(*group.replies, worse[drawn % len(worse)]), augmented=())


def chained(threads: Iterable[Thread], settings: Mapping[str, SetConfig], seed: int) -> Iterator[Thread]:
    """`chain_threads` set by set, where a set's `fill_min_length` asks for it."""
    for name, own in groupby(threads, key=lambda thread: thread.dataset):
        yield from chain_threads(own, settings.get(name, SetConfig()).fill_min_length or 0, seed)


def chain_threads(threads: Iterable[Thread], min_length: int, seed: int, window: int = CHAIN_WINDOW) -> Iterator[Thread]:
    """Short conversations joined into longer ones, in an order drawn by the seed, each until it has `min_length` characters.

    Only threads with the same system message (or none) are joined, which then leads once. A chain has the ids of its first thread.
    At most `window` threads are held beside the open chains; with min_length = 0 the threads come as they are.
    """
    if min_length <= 0:
        yield from threads
        return
    rng = random.Random(seed)
    chains: dict[Message | None, list[Thread]] = {}
    rest = iter(threads)
    while batch := list(islice(rest, window)):
        rng.shuffle(batch)
        for thread in batch:
            if thread.messages[-1].role != "assistant":  # raw text
                yield thread
                continue
            chain = chains.setdefault(_system(thread), [])
            chain.append(thread)
            if sum(map(_length, chain)) >= min_length:
                yield _joined(chains.pop(_system(thread)))
    yield from map(_joined, chains.values())


def _joined(chain: list[Thread]) -> Thread:
    first, *others = chain
    later = (message for thread in others for message in thread.messages if message.role != "system")
    return replace(first, messages=(*first.messages, *later))


def _system(thread: Thread) -> Message | None:
    return thread.messages[0] if thread.messages[0].role == "system" else None


def _length(thread: Thread) -> int:
    return sum(len(message.content) for message in thread.messages)
