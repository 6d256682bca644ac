"""The replies of a data source, one record each, whatever format they come in: what offline scoring reads."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from app.config.data import SetConfig
from app.data.record_store import RecordTable, RecordWriter
from app.data.rows import Quarantine, RowReader
from app.data.source import read_lines
from app.errors import DataError
from app.formats import FORMATS
from app.formats.records import BadRow, Filters, Message, Row, TreeRecords
from app.formats.screening import phrases_of

Pair = tuple[tuple[Message, ...], str]
"""A conversation that ends in a user turn, and a reply to it."""


@dataclass(frozen=True)
class Reply:
    """One reply to score. row: its number among all, from 0; file and line: where its conversation was read (of a tree in flat
    messages: the line that completed it); id: of the conversation; reply: number among the replies of its row."""

    row: int
    file: str
    line: int
    id: str
    reply: int
    messages: tuple[Message, ...]
    text: str


@dataclass(frozen=True)
class Counts:
    """rows: lines read; replies: found in them; without_reply: rows that have none, or that a filter left out; quarantined: rows
    that cannot be used."""

    rows: int
    replies: int
    without_reply: int
    quarantined: int


def read_replies(source: SetConfig, file: Path, quarantine: Path, *, every_turn: bool, strict: bool) -> Counts:
    """Write the replies of `source` to `file` (see `open_replies`), rows that cannot be used to `quarantine`.

    every_turn: score each answer of a conversation, not only its last; of trees each answer is one in any case.
    Raises DataError where nothing can be read or there is no reply, and (strict) at the first malformed row.
    """
    assert source.path is not None
    count = without = 0
    with ExitStack() as open_files:
        bad = open_files.enter_context(Quarantine(quarantine, strict=strict))
        out = open_files.enter_context(RecordWriter(file, Reply))
        reader = RowReader(source.path, source, bad)
        filters = Filters(
            source.lang or (), source.top_k, source.columns.named(), phrases_of(source.phrases or ()), source.max_characters or 0
        )
        rows = _Tracked(reader)
        for found in FORMATS[reader.format].read(rows, filters):
            if isinstance(found, BadRow):
                bad.add(found)
                continue
            pairs = replies_of(found, every_turn=every_turn or reader.format == "oasst")
            without += not pairs
            for number, ((messages, text), name) in enumerate(pairs.items()):
                out.add(0, Reply(count, rows.last.file, rows.last.line, name, number, messages, text), 0)
                count += 1
    if not count:
        why = f"{bad.count} rows cannot be used (first: {bad.first_reason}; see {quarantine})" if bad.count else "no row of it has one"
        raise DataError(f"{source.path} ({reader.format} format): no reply to score: {why}; check data.format, data.columns and data.lang")
    return Counts(reader.count, count, without, bad.count)


def open_replies(file: Path) -> RecordTable[Reply]:
    """What `read_replies` wrote, mapped into memory."""
    return RecordTable(file, Reply)


def replies_of(found: TreeRecords, *, every_turn: bool) -> dict[Pair, str]:
    """The replies of a row, each once, with the id of the conversation: those of its ranked groups in their order, then the answers
    that its threads end in or, with every_turn, all their answers."""
    pairs: dict[Pair, str] = {}
    for group in found.groups:
        for text in (*group.replies, *group.augmented):
            pairs.setdefault((group.prefix, text), group.id)
    for thread in found.threads:
        for place, message in enumerate(thread.messages):
            if message.role == "assistant" and (every_turn or place == len(thread.messages) - 1):
                pairs.setdefault((thread.messages[:place], message.content), thread.id)
    return pairs


def source_digest(source: SetConfig) -> str:
    """SHA-256 over the lines behind a source, hex. Raises DataError where they cannot be read."""
    assert source.path is not None
    digest = hashlib.sha256()
    for line in read_lines(source.path, subset=source.subset, split=source.split, files=source.files):
        digest.update(line.data)
    return digest.hexdigest()


class _Tracked:
    """Rows on their way to a format, which takes one at a time; `last`: the one that it took last."""

    last: Row

    def __init__(self, rows: Iterable[Row]) -> None:
        self._rows = rows

    def __iter__(self) -> Iterator[Row]:
        for row in self._rows:
            self.last = row
            yield row
