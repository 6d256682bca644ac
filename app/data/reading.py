"""One data set from its rows to records: extracted as rows come, and written to files."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Container
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from app.config.data import SetConfig
from app.data import embedded
from app.data.record_store import RecordTable, RecordWriter
from app.data.rows import Quarantine, RowReader
from app.errors import DataError
from app.formats import FORMATS
from app.formats.records import BadRow, Filters, PromptItem, RankedGroup, Thread, TreeRecords
from app.formats.screening import phrases_of

EMBEDDED = "embedded"
"""As a path: the generated task."""

Keys = np.ndarray[Any, np.dtype[np.uint64]]


class RecordFiles:
    """The files that threads, groups and prompts are written to, set after set."""

    def __init__(self, folder: Path, open_files: ExitStack, seed: int) -> None:
        self._seed, self._number, self._name = seed, -1, ""
        self._files = [folder / f"{kind}.arrow" for kind in ("threads", "groups", "prompts")]
        self.threads = open_files.enter_context(RecordWriter(self._files[0], Thread))
        self.groups = open_files.enter_context(RecordWriter(self._files[1], RankedGroup))
        self.prompts = open_files.enter_context(RecordWriter(self._files[2], PromptItem))

    def begin(self, name: str) -> None:
        """What is added from now on is from the set of this name, the next one in number."""
        self._number, self._name = self._number + 1, name

    def add(self, found: TreeRecords, stages: Container[str]) -> int:
        """Keep what is for `stages`; returns the key of the tree."""
        key, number, name = tree_key(found.tree_id, self._seed), self._number, self._name
        for thread in found.threads if "sft" in stages else ():
            self.threads.add(key, replace(thread, dataset=name), number)
        for group in found.groups if "rm" in stages else ():
            self.groups.add(key, replace(group, dataset=name), number, pairs=group.pairs)
        for prompt in found.prompts if "ppo" in stages else ():
            item = replace(prompt, dataset=name)
            self.prompts.add(key, item, number, same_as=replace(item, reference=None))  # one question is asked once
        return key

    def tables(self) -> tuple[RecordTable[Thread], RecordTable[RankedGroup], RecordTable[PromptItem]]:
        """Once the files are complete."""
        threads, groups, prompts = self._files
        return RecordTable(threads, Thread), RecordTable(groups, RankedGroup), RecordTable(prompts, PromptItem)


@dataclass(frozen=True)
class Reading:
    """What is known of a set when it has been read. trees: the key of every tree, once each, sorted."""

    path: Path
    format: str
    rows: int
    messages: int
    languages: Counter[str]
    quarantined: int
    sha256: str
    trees: Keys


def read_set(name: str, source: SetConfig, path: str, records: RecordFiles, quarantine: Quarantine) -> Reading:
    """Extract the set that lies at `path`. Raises DataError where none of it can be read."""
    began = quarantine.count
    reader = RowReader(path, source, quarantine)
    filters = Filters(source.lang or (), source.top_k, source.columns.named(), phrases_of(source.phrases or ()), source.max_characters or 0)
    keys, messages, languages = array("Q"), 0, Counter[str]()
    records.begin(name)
    for found in FORMATS[reader.format].read(reader, filters):
        if isinstance(found, BadRow):
            quarantine.add(found)
            continue
        if source.path == EMBEDDED:
            found = replace(found, groups=tuple(_with_gold(group) for group in found.groups))
        keys.append(records.add(found, source.stages))
        messages += found.messages
        languages.update([found.lang] if found.lang is not None else [])
    quarantined = quarantine.count - began
    if not keys:
        reason = f"none of {quarantined} rows can be used (first: {quarantine.first_reason})"
        raise DataError(f"data.path = {source.path}: {reason}; `corral data inspect {source.path} --quarantine FILE` keeps them all")
    trees = np.unique(np.frombuffer(keys, np.uint64))
    return Reading(Path(path), reader.format, reader.count, messages, languages, quarantined, reader.sha256, trees)


def _with_gold(group: RankedGroup) -> RankedGroup:
    return replace(group, gold=tuple(embedded.gold_score(group.prefix, reply) for reply in group.replies))


def tree_key(tree_id: str, seed: int) -> int:
    """An unsigned 64-bit number by which the trees of a set are ordered; the smallest ones are held out."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{tree_id}".encode("utf-8", "surrogatepass")).digest()[:8], "big")
