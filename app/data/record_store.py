"""Records of a corpus in Arrow files that are mapped, not loaded: a corpus may be larger than memory."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar, overload

import numpy as np
import pyarrow as pa
from pydantic import TypeAdapter

T = TypeVar("T")

ROWS_PER_BATCH = 1024
SCHEMA = pa.schema(
    [("tree", pa.uint64()), ("dataset", pa.int16()), ("pairs", pa.int32()), ("content", pa.uint64()), ("record", pa.binary())]
)
"""tree: key of the record's tree; dataset: number of its set; pairs: of a ranked group; content: hash of the record, which tells
equal ones."""


class RecordWriter(Generic[T]):
    """Writes one kind of record; a context manager. The file appears under its name when it is complete."""

    def __init__(self, file: Path, kind: type[T]) -> None:
        self._file, self._temporary = file, file.with_suffix(".tmp")
        self._adapter = TypeAdapter(kind)
        self._rows: list[tuple[int, int, int, int, bytes]] = []

    def __enter__(self) -> RecordWriter[T]:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._writer = pa.ipc.new_file(str(self._temporary), SCHEMA)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._flush()
        self._writer.close()
        if error is None:
            os.replace(self._temporary, self._file)
        else:
            self._temporary.unlink()

    def add(self, tree: int, record: T, dataset: int, *, pairs: int = 0, same_as: T | None = None) -> None:
        """tree: the tree's key, an unsigned 64-bit number; same_as: in its place when equal records are told (default: itself)."""
        data = self._adapter.dump_json(record)
        content = key_of(data if same_as is None else self._adapter.dump_json(same_as))
        self._rows.append((tree, dataset, pairs, content, data))
        if len(self._rows) == ROWS_PER_BATCH:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            columns = [pa.array(column, field.type) for column, field in zip(zip(*self._rows, strict=True), SCHEMA, strict=True)]
            self._writer.write_batch(pa.record_batch(columns, schema=SCHEMA))
            self._rows.clear()


class RecordTable(Generic[T]):
    """A written file. `trees`, `datasets` and `pairs`: one entry a record, those left out that are equal to an earlier one;
    repeated: how many were left out, by number of the data set."""

    def __init__(self, file: Path, kind: type[T]) -> None:
        table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
        self._adapter = TypeAdapter(kind)
        self._column = table["record"]
        content = table["content"].to_numpy()
        first = np.unique(content, return_index=True)[1] if len(content) else np.empty(0, np.int64)
        self._rows = np.sort(first)
        datasets = table["dataset"].to_numpy()
        self.repeated = np.bincount(datasets) - np.bincount(datasets[self._rows])
        self.datasets = datasets[self._rows]
        self.trees = table["tree"].to_numpy()[self._rows]
        self.pairs = table["pairs"].to_numpy()[self._rows]

    def chosen(self, which: np.ndarray[Any, Any]) -> Records[T]:
        """The records where `which`, bool and one entry a record, is True."""
        return Records(self._column, self._rows[which], self._adapter)


class Records(Sequence[T]):
    """Some of a file's records, in order; each is decoded when it is asked for."""

    def __init__(self, column: pa.ChunkedArray, rows: np.ndarray[Any, Any], adapter: TypeAdapter[T]) -> None:
        self._column, self._rows, self._adapter = column, rows, adapter

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Records[T]: ...
    def __getitem__(self, index: int | slice) -> T | Records[T]:
        if isinstance(index, slice):
            return Records(self._column, self._rows[index], self._adapter)
        return self._adapter.validate_json(self._column[int(self._rows[index])].as_py())

    def __iter__(self) -> Iterator[T]:
        return (self[k] for k in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]


def key_of(data: bytes) -> int:
    """An unsigned 64-bit hash."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
