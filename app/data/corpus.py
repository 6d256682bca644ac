"""The corpus of a run: rows read as they come, malformed ones set aside, extracted, and split by conversation tree.

Records go into files under the run folder and are mapped from there, so a source may be larger than memory; what stays in
memory is a few numbers a record.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from app.config.data import DataConfig, SetConfig
from app.data import embedded
from app.data.record_store import RecordTable, RecordWriter
from app.data.rows import Quarantine, RowReader
from app.errors import DataError
from app.formats import FORMATS
from app.formats.records import BadRow, Filters, Message, PromptItem, RankedGroup, Thread, TreeRecords

__all__ = [
    "Corpus",
    "Message",
    "PromptItem",
    "RankedGroup",
    "Split",
    "Thread",
    "load_corpus",
    "require_groups",
    "require_prompts",
    "require_threads",
]

QUARANTINE = "quarantine.jsonl"
RECORDS = "records"

Keys = np.ndarray[Any, np.dtype[np.uint64]]


@dataclass(frozen=True)
class Split:
    """One side of the train/validation split; records of one data set stand next to each other."""

    threads: Sequence[Thread]
    groups: Sequence[RankedGroup]
    prompts: Sequence[PromptItem]

    def texts(self) -> Iterator[str]:
        """Every message text once, in order of first appearance: what a tokenizer is trained on."""
        seen: set[str] = set()
        for messages in self.conversations():
            for message in messages:
                if message.content not in seen:
                    seen.add(message.content)
                    yield message.content

    def conversations(self) -> Iterator[tuple[Message, ...]]:
        """Those of all threads, then those of all prompts."""
        yield from (thread.messages for thread in self.threads)
        yield from (prompt.messages for prompt in self.prompts)


@dataclass(frozen=True)
class Source:
    """What one data set gave. rows: lines read; counts: trees, messages, threads, groups, pairs and prompts over both splits;
    repeated: equal threads left out; quarantined: rows set aside; languages: trees by language, where the data says so;
    sha256: of the lines read; path: the embedded task's file, else as configured."""

    path: Path
    format: str
    rows: int
    counts: dict[str, int]
    languages: dict[str, int]
    repeated: int
    quarantined: int
    sha256: str


@dataclass(frozen=True)
class Corpus:
    """Both sides of the split, and each data set by its name."""

    train: Split
    validation: Split
    sources: dict[str, Source]

    @property
    def path(self) -> str:
        """For messages: every set's path."""
        return ", ".join(str(source.path) for source in self.sources.values())

    @property
    def format(self) -> str:
        return ", ".join(dict.fromkeys(source.format for source in self.sources.values()))

    def facts(self) -> dict[str, Any]:
        """For a run's manifest: the whole and, where there are several, each set."""
        whole = {"path": self.path, "format": self.format, "counts": self.counts, "quarantined": self.quarantined}
        if len(self.sources) == 1:
            return whole
        return whole | {"sets": {name: asdict(source) | {"path": str(source.path)} for name, source in self.sources.items()}}

    @property
    def rows(self) -> int:
        return sum(source.rows for source in self.sources.values())

    @property
    def quarantined(self) -> int:
        return sum(source.quarantined for source in self.sources.values())

    @property
    def counts(self) -> dict[str, int]:
        first, *others = (source.counts for source in self.sources.values())
        return {name: count + sum(other[name] for other in others) for name, count in first.items()}

    @property
    def languages(self) -> dict[str, int]:
        return dict(sum((Counter(source.languages) for source in self.sources.values()), Counter[str]()).most_common())

    @property
    def sha256(self) -> str:
        """That of the only set, or over the names and hashes of all."""
        sets = {name: source.sha256 for name, source in self.sources.items()}
        return next(iter(sets.values())) if len(sets) == 1 else hashlib.sha256(repr(sorted(sets.items())).encode()).hexdigest()


def load_corpus(config: DataConfig, *, seed: int, folder: Path) -> Corpus:
    """Read every data set, extract and split.

    Writes under `folder`: the embedded task's trees (`embedded.jsonl`), rows that cannot be used (`quarantine.jsonl`, one
    {"file", "line", "reason", "text"} each) and the records. The split depends on the seed and the tree ids, not on the order of
    rows; a tree that is held out of one set is held out of all.
    Raises DataError when nothing can be read, the format is unknown, or (`data.strict`) at the first malformed row.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sources = config.sources()
    readings: dict[str, _Reading] = {}
    with ExitStack() as open_files:
        quarantine = open_files.enter_context(Quarantine(folder / QUARANTINE, strict=config.strict))
        records = _Records(folder / RECORDS, open_files)
        for name, source in sources.items():
            readings[name] = _read_set(name, source, config, records, quarantine, seed, folder)
    held_out = np.concatenate([_held_out_trees(readings[name].trees, source.val_split or 0.0) for name, source in sources.items()])
    threads, groups, prompts = records.tables()
    limits = {name: source.max_val_set for name, source in sources.items()}

    def side(*, validation: bool) -> Split:
        chosen = [_side(table, held_out, limits if validation else {}, validation, seed) for table in (threads, groups, prompts)]
        return Split(threads.chosen(chosen[0]), groups.chosen(chosen[1]), prompts.chosen(chosen[2]))

    found = {name: _source(name, reading, threads, groups, prompts) for name, reading in readings.items()}
    return Corpus(side(validation=False), side(validation=True), found)


# --- reading -------------------------------------------------------------------------------------------------------------


class _Records:
    """The three files that records are written to."""

    def __init__(self, folder: Path, open_files: ExitStack) -> None:
        self._files = [folder / f"{kind}.arrow" for kind in ("threads", "groups", "prompts")]
        self.threads = open_files.enter_context(RecordWriter(self._files[0], Thread))
        self.groups = open_files.enter_context(RecordWriter(self._files[1], RankedGroup))
        self.prompts = open_files.enter_context(RecordWriter(self._files[2], PromptItem))

    def add(self, found: TreeRecords, tree: int, dataset: str) -> None:
        for thread in found.threads:
            self.threads.add(tree, replace(thread, dataset=dataset), dataset)
        for group in found.groups:
            self.groups.add(tree, replace(group, dataset=dataset), dataset, pairs=group.pairs)
        for prompt in found.prompts:
            self.prompts.add(tree, replace(prompt, dataset=dataset), dataset)

    def tables(self) -> tuple[RecordTable[Thread], RecordTable[RankedGroup], RecordTable[PromptItem]]:
        """Once the files are complete."""
        threads, groups, prompts = self._files
        return RecordTable(threads, Thread), RecordTable(groups, RankedGroup), RecordTable(prompts, PromptItem)


@dataclass(frozen=True)
class _Reading:
    """What is known of a set when it has been read. trees: the key of every tree, once each, sorted."""

    path: Path
    format: str
    rows: int
    messages: int
    languages: Counter[str]
    quarantined: int
    sha256: str
    trees: Keys


def _read_set(
    name: str, source: SetConfig, config: DataConfig, records: _Records, quarantine: Quarantine, seed: int, folder: Path
) -> _Reading:
    path = source.path
    if path is None:
        raise DataError(f"data.sets.{name} has no path: name its file, folder, URL or hub name")
    is_embedded = path == "embedded"
    if is_embedded:
        path = str(embedded.write_trees(folder / "embedded.jsonl", trees=config.embedded.trees, seed=seed))
    began = quarantine.count
    reader = RowReader(path, source, quarantine)
    filters = Filters(source.lang or (), source.top_k, source.columns.named())
    keys, messages, languages = array("Q"), 0, Counter[str]()
    for found in FORMATS[reader.format].read(reader, filters):
        if isinstance(found, BadRow):
            quarantine.add(found)
            continue
        if is_embedded:
            found = replace(found, groups=tuple(_with_gold(group) for group in found.groups))
        key = tree_key(found.tree_id, seed)
        records.add(found, key, name)
        keys.append(key)
        messages += found.messages
        languages.update([found.lang] if found.lang is not None else [])
    quarantined = quarantine.count - began
    if not keys:
        reason = f"none of {quarantined} rows can be used (first: {quarantine.first_reason})"
        raise DataError(f"data.path = {source.path}: {reason}; see {quarantine.file}")
    trees = np.unique(np.frombuffer(keys, np.uint64))
    return _Reading(Path(path), reader.format, reader.count, messages, languages, quarantined, reader.sha256, trees)


def _with_gold(group: RankedGroup) -> RankedGroup:
    return replace(group, gold=tuple(embedded.gold_score(group.prefix, reply) for reply in group.replies))


# --- the split -----------------------------------------------------------------------------------------------------------


def tree_key(tree_id: str, seed: int) -> int:
    """An unsigned 64-bit number by which the trees of a set are ordered; the smallest ones are held out."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{tree_id}".encode("utf-8", "surrogatepass")).digest()[:8], "big")


def _held_out_trees(trees: Keys, val_split: float) -> Keys:
    """round(val_split x trees) of the sorted keys, but at least one on each side where there are two trees."""
    return trees[: min(max(round(val_split * len(trees)), 1), len(trees) - 1)]


def _side(table: RecordTable[Any], held_out: Keys, limits: dict[str, int | None], validation: bool, seed: int) -> np.ndarray[Any, Any]:
    """Which records belong to one side: bool, one entry a record. limits: the most that each data set may have there."""
    chosen: np.ndarray[Any, Any] = np.isin(table.trees, held_out) == validation
    for number, (name, limit) in enumerate(limits.items()):
        ours = np.flatnonzero(chosen & (table.datasets == name))
        if limit is not None and len(ours) > limit:
            chosen[np.random.default_rng([seed, number]).permutation(ours)[limit:]] = False
    return chosen


def _source(
    name: str, reading: _Reading, threads: RecordTable[Thread], groups: RecordTable[RankedGroup], prompts: RecordTable[PromptItem]
) -> Source:
    of_set = groups.datasets == name
    counts = {
        "trees": len(reading.trees),
        "messages": reading.messages,
        "threads": int((threads.datasets == name).sum()),
        "groups": int(of_set.sum()),
        "pairs": int(groups.pairs[of_set].sum()),
        "prompts": int((prompts.datasets == name).sum()),
    }
    languages = dict(reading.languages.most_common())
    repeated = threads.repeated.get(name, 0)
    return Source(reading.path, reading.format, reading.rows, counts, languages, repeated, reading.quarantined, reading.sha256)


# --- what stages need ----------------------------------------------------------------------------------------------------


def require_threads(corpus: Corpus) -> None:
    """Raises DataError when SFT has nothing to train on or to evaluate with."""
    _require(corpus, "threads", "conversation that ends in an assistant turn", "SFT")


def require_groups(corpus: Corpus) -> None:
    """Raises DataError when a reward model has no ranked replies to train on or to evaluate with."""
    _require(corpus, "groups", "prompt with two or more ranked replies", "a reward model")


def require_prompts(corpus: Corpus) -> None:
    """Raises DataError when PPO has no prompts to answer or to evaluate with."""
    _require(corpus, "prompts", "prompt", "PPO")


def _require(corpus: Corpus, kind: str, thing: str, stage: str) -> None:
    for side, split in (("training", corpus.train), ("validation", corpus.validation)):
        if not getattr(split, kind):
            raise DataError(
                f"{corpus.path} ({corpus.format} format): no {thing} in the {side} split, and {stage} needs one; "
                "check data.path, data.lang, data.top_k and data.val_split"
            )
