"""What a data source holds, before anything is trained on it: counts, languages, lengths, duplicates, leakage, unusable rows."""

from __future__ import annotations

import json
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import nlargest
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from app.data.corpus import QUARANTINE, Corpus, Split
from app.data.templates import Template
from app.formats.records import Message, Thread

LONGEST = 5
SHOWN_REASONS = 10
MEMBER = re.compile(r"message \S+|tree \S+|'[^']*'|\d+")
"""What makes two reasons of one kind differ: names, quoted values, numbers."""


@dataclass(frozen=True)
class Inspection:
    """lengths: per SFT thread, tokens with a template, else words; unit says which. duplicates: conversations that occur again.
    leakage: first user turns that stand on both sides of the split. left_out: what the choice of languages leaves out.
    truncated: threads longer than data.max_length (tokens only). round_trip_failures: threads whose text does not come back from their
    tokens; None without a template."""

    format: str
    rows: int
    counts: dict[str, int]
    quarantined: int
    reasons: dict[str, int]
    languages: dict[str, int]
    left_out: tuple[str, ...]
    unit: str
    lengths: Sequence[int]
    longest: tuple[tuple[int, str], ...]
    duplicates: int
    leakage: int
    truncated: int | None
    round_trip_failures: int | None

    def as_dict(self) -> dict[str, Any]:
        """One flat JSON object; the names of counts are those of the training stages."""
        counts = self.counts
        return {
            "format": self.format,
            "rows": self.rows,
            "trees": counts["trees"],
            "messages": counts["messages"],
            "sft_threads": counts["threads"],
            "rm_groups": counts["groups"],
            "rm_pairs": counts["pairs"],
            "rl_prompts": counts["prompts"],
            "quarantined": self.quarantined,
            "quarantine_reasons": self.reasons,
            "languages": self.languages,
            "left_out": list(self.left_out),
            "length_unit": self.unit,
            "length_percentiles": percentiles(self.lengths),
            "duplicates": self.duplicates,
            "leakage": self.leakage,
            "truncated": self.truncated,
            "round_trip_failures": self.round_trip_failures,
        }


def inspect_corpus(corpus: Corpus, folder: Path, template: Template | None = None, max_length: int = 0) -> Inspection:
    """Look at a corpus whose quarantine file lies in `folder`. With a template, lengths are tokens and the round trip is tried."""
    lengths = array("q")
    longest: list[tuple[int, str]] = []
    conversations = array("q")
    failures = 0
    for thread in chain(corpus.train.threads, corpus.validation.threads):
        if template is None:
            length = _words(thread)
        else:
            ids, _ = template.encode(thread.messages, open_assistant=False)
            length = len(ids)
            failures += not comes_back(template, ids, thread.messages)
        lengths.append(length)
        longest = nlargest(LONGEST, [*longest, (length, thread.messages[0].content)], key=itemgetter(0))
        conversations.append(hash(tuple((message.role, message.content) for message in thread.messages)))
    return Inspection(
        format=corpus.format,
        rows=corpus.rows,
        counts=corpus.counts,
        quarantined=corpus.quarantined,
        reasons=quarantine_reasons(folder / QUARANTINE),
        languages=corpus.languages,
        left_out=corpus.left_out,
        unit="words" if template is None else "tokens",
        lengths=lengths,
        longest=tuple(longest),
        duplicates=len(conversations)
        - len(np.unique(np.array(conversations)))
        + sum(source.repeated for source in corpus.sources.values()),
        leakage=len(np.intersect1d(_first_turns(corpus.train), _first_turns(corpus.validation))),
        truncated=None if template is None else sum(length > max_length for length in lengths),
        round_trip_failures=None if template is None else failures,
    )


def comes_back(template: Template, ids: Sequence[int], messages: Iterable[Message]) -> bool:
    """Whether the text of every message stands, in order, in what the tokens decode to."""
    text = template.tokenizer.decode(list(ids), skip_special_tokens=False)
    place = 0
    for message in messages:
        place = text.find(message.content.strip(), place)
        if place < 0:
            return False
        place += len(message.content.strip())
    return True


def quarantine_reasons(file: Path) -> dict[str, int]:
    """Why rows were set aside, the most frequent reason first; names and numbers in the reasons are blanked out."""
    if not file.is_file():
        return {}
    with file.open(encoding="utf-8") as lines:
        reasons = Counter(MEMBER.sub("…", json.loads(line)["reason"]) for line in lines)
    return dict(reasons.most_common(SHOWN_REASONS))


def percentiles(lengths: Sequence[int]) -> dict[str, int]:
    """Smallest, median, 90th, 99th percentile and largest; empty without lengths."""
    if not lengths:
        return {}
    ordered = sorted(lengths)
    return {
        name: ordered[round(share * (len(ordered) - 1))]
        for name, share in (("min", 0), ("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1))
    }


def histogram(lengths: Sequence[int], bins: int = 12) -> list[tuple[int, int, int]]:
    """(from, below, how many) of equally wide bins over all lengths; whole numbers."""
    if not lengths:
        return []
    low, width = min(lengths), max(1, -(-(max(lengths) + 1 - min(lengths)) // bins))
    counts = Counter((length - low) // width for length in lengths)
    return [(low + k * width, low + (k + 1) * width, counts[k]) for k in range(max(counts) + 1)]


def _words(thread: Thread) -> int:
    return sum(len(message.content.split()) for message in thread.messages)


def _first_turns(split: Split) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Hashes of the user turns that conversations begin with; raw text has none, and its own text stands for one."""
    openings = (next((m for m in messages if m.role == "user"), messages[0]).content for messages in split.conversations())
    return np.fromiter(map(hash, openings), np.int64)
