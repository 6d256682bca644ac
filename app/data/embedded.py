"""The embedded task: prompts that ask for a few words on a topic in a manner, and replies graded by a hidden rule.

    Name three beach things for a quiz. Talk like a pirate.
    Arr: towel, goggles and violin, matey!

A reply lists as many words as asked; some belong to the prompt's topic, the others all to one other topic, and its opening and
closing are in the asked manner or in another one. So nothing in a reply alone (its length, its words, how well its words belong
together) says how good it is: only prompt and reply together do. Good and bad replies mirror each other in frequency.
The gold score below is the hidden rule. It ranks the replies of a tree and, later, measures models; no training reads it.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from app.formats.records import Message

TOPICS: dict[str, tuple[str, ...]] = {
    "beach": ("towel", "sandals", "goggles", "shells", "sunscreen", "bucket"),
    "kitchen": ("pan", "kettle", "whisk", "spoon", "oven", "toaster"),
    "garden": ("rake", "roses", "tulips", "shovel", "seeds", "fence"),
    "farm": ("cow", "tractor", "barn", "hay", "goat", "pig"),
    "music": ("drum", "flute", "violin", "piano", "trumpet", "harp"),
    "space": ("rocket", "moon", "comet", "planet", "stars", "galaxy"),
    "winter": ("snow", "mittens", "scarf", "skates", "sled", "icicle"),
    "fruit": ("apple", "banana", "mango", "cherry", "lemon", "peach"),
    "zoo": ("lion", "zebra", "monkey", "giraffe", "tiger", "panda"),
    "camping": ("tent", "lantern", "campfire", "backpack", "compass", "map"),
}

MANNERS: dict[str, tuple[tuple[str, str], ...]] = {
    "pirate": (("Arr", "matey"), ("Ahoy", "matey"), ("Arr", "hearty")),
    "robot": (("Beep", "human"), ("Bzzt", "human"), ("Beep", "unit")),
    "cowboy": (("Howdy", "partner"), ("Yeehaw", "partner"), ("Howdy", "pal")),
    "butler": (("Certainly", "sir"), ("Indeed", "sir"), ("Certainly", "madam")),
}
"""Openings and closings of each manner; none occurs in two manners."""

NUMBERS = {"three": 3, "four": 4}

QUESTIONS = (
    "Name {number} {topic} things{extra}.",
    "List {number} {topic} words{extra}.",
    "Give me {number} {topic} ideas{extra}.",
    "I need {number} {topic} words{extra}.",
    "Tell me {number} {topic} things{extra}.",
)
EXTRAS = ("", " please", " now", " today", " for me", " for fun", " for school", " for a quiz")
REQUESTS = ("Talk like a {manner}.", "Be a {manner}.", "As a {manner}.")
FOLLOW_UP = "And {number} {topic} things? {request}"

REPLIES = 4
FOLLOW_UP_SHARE = 0.1
MANNER_WEIGHT = 0.4
MIN_GAP = 0.24
"""Replies of one tree differ by at least this much in gold: people, too, rank what they can tell apart."""

_TOPIC_OF = {word: topic for topic, words in TOPICS.items() for word in words}
_MANNER_OF = {
    word.lower(): manner for manner, forms in MANNERS.items() for form in forms for part in form for word in re.findall(r"[A-Za-z]+", part)
}


@dataclass(frozen=True)
class Request:
    """What a prompt asks for: how many words, of which topic, in which manner."""

    number: str
    topic: str
    manner: str


# --- the hidden rule -----------------------------------------------------------------------------------------------------


@lru_cache(maxsize=65536)
def parse_request(prompt: str) -> Request:
    """Read a prompt of this task. Raises ValueError for any other text."""
    words = re.findall(r"[a-z]+", prompt.lower())
    number = next((word for word in words if word in NUMBERS), None)
    manner = next((word for word in reversed(words) if word in MANNERS), None)
    topic = next((word for word in words if word in TOPICS), None)
    if number is None or manner is None or topic is None:
        raise ValueError(f"no prompt of the embedded task: {prompt!r}")
    return Request(number, topic, manner)


def gold_score(messages: Sequence[Message], reply: str) -> float:
    """The hidden score of a reply to a conversation of this task, in [-1, 1.4]; only the last user turn counts.

    Share of the asked words that are distinct and on the topic, minus the same share for every word beyond the number asked
    (at most 1), plus 0.4 where the reply's manner is the asked one and no other.
    """
    request = parse_request(messages[-1].content)
    asked = NUMBERS[request.number]
    words = re.findall(r"[a-z]+", reply.lower())
    items = [word for word in words if word in _TOPIC_OF]
    on_topic = {word for word in items[:asked] if _TOPIC_OF[word] == request.topic}
    surplus = min(max(0, len(items) - asked), asked)
    manners = {_MANNER_OF[word] for word in words if word in _MANNER_OF}
    return (len(on_topic) - surplus) / asked + (MANNER_WEIGHT if manners == {request.manner} else 0.0)


# --- the generator -------------------------------------------------------------------------------------------------------


def all_prompts() -> list[str]:
    """Every distinct opening prompt, in a fixed order."""
    return [
        f"{question.format(number=number, topic=topic, extra=extra)} {request.format(manner=manner)}"
        for question, number, topic, extra, request, manner in itertools.product(QUESTIONS, NUMBERS, TOPICS, EXTRAS, REQUESTS, MANNERS)
    ]


def write_reply(items: Sequence[str], manner: str, rng: random.Random) -> str:
    """One sentence that lists the items in a manner."""
    opening, closing = rng.choice(MANNERS[manner])
    return f"{opening}: {', '.join(items[:-1])} and {items[-1]}, {closing}!"


def graded_replies(prompt: str, rng: random.Random) -> list[tuple[float, str]]:
    """`REPLIES` replies of clearly different gold scores to a prompt, best first, as (gold, text).

    The combinations of words on the topic (0 .. asked) and right or wrong manner are drawn from all sets of them that keep
    `MIN_GAP`, which are symmetric: for every set there is one with good and bad exchanged.
    """
    request = parse_request(prompt)
    asked = NUMBERS[request.number]
    grades = rng.choice(grade_sets(asked))
    out = []
    for on_topic, right_manner in grades:
        other = rng.choice([topic for topic in TOPICS if topic != request.topic])
        items = rng.sample(TOPICS[request.topic], on_topic) + rng.sample(TOPICS[other], asked - on_topic)
        rng.shuffle(items)
        manner = request.manner if right_manner else rng.choice([name for name in MANNERS if name != request.manner])
        reply = write_reply(items, manner, rng)
        out.append((gold_score((Message("user", prompt),), reply), reply))
    return sorted(out, reverse=True)


@lru_cache
def grade_sets(asked: int) -> list[tuple[tuple[int, bool], ...]]:
    """All sets of `REPLIES` grades (words on the topic, manner right) whose gold scores keep `MIN_GAP`."""

    def gold(grade: tuple[int, bool]) -> float:
        return grade[0] / asked + MANNER_WEIGHT * grade[1]

    grades = sorted(itertools.product(range(asked + 1), (False, True)), key=gold)
    return [
        chosen
        for chosen in itertools.combinations(grades, REPLIES)
        if all(gold(better) - gold(worse) >= MIN_GAP for worse, better in itertools.pairwise(chosen))
    ]


def generate_trees(trees: int, seed: int) -> Iterator[dict[str, Any]]:
    """Conversation trees in the OASST export format: distinct opening prompts, four ranked replies each, and below the best
    reply of every tenth tree a second question on another topic with ranked replies of its own.

    The same arguments give the same trees. Raises ValueError when there are not that many distinct prompts.
    """
    rng = random.Random(seed)
    for index, prompt in enumerate(rng.sample(all_prompts(), trees)):
        name = f"embedded-{seed}-{index:05d}"
        root = _question(name, None, prompt, rng)
        if rng.random() < FOLLOW_UP_SHARE:
            best = root["replies"][0]
            request = rng.choice(REQUESTS).format(manner=rng.choice(list(MANNERS)))
            topic = rng.choice([topic for topic in TOPICS if topic != parse_request(prompt).topic])
            text = FOLLOW_UP.format(number=rng.choice(list(NUMBERS)), topic=topic, request=request)
            best["replies"] = [_question(f"{best['message_id']}-0", best["message_id"], text, rng)]
        yield {"message_tree_id": name, "tree_state": "ready_for_export", "prompt": root}


def _question(name: str, parent: str | None, text: str, rng: random.Random) -> dict[str, Any]:
    replies = [
        {**_message(f"{name}-{rank}", name, "assistant", reply), "rank": rank, "replies": []}
        for rank, (_, reply) in enumerate(graded_replies(text, rng))
    ]
    return {**_message(name, parent, "prompter", text), "replies": replies}


def _message(name: str, parent: str | None, role: str, text: str) -> dict[str, Any]:
    return {
        "message_id": name,
        "parent_id": parent,
        "text": text,
        "role": role,
        "lang": "en",
        "review_result": True,
        "deleted": False,
        "synthetic": False,
    }


def write_trees(file: Path, *, trees: int, seed: int) -> Path:
    """Write the trees as OASST JSON lines, whole or not at all."""
    temporary = file.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        for tree in generate_trees(trees, seed):
            stream.write(json.dumps(tree) + "\n")
    os.replace(temporary, file)
    return file
