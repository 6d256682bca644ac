"""Tokenised rows of SFT and reward model in Arrow files: workers map them and read ids, instead of tokenising text."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

import numpy as np
import pyarrow as pa

from app.errors import DataError
from app.experience import IntArray

TRAIN_FILE, HELD_OUT_FILE = "train.arrow", "validation.arrow"
"""Token caches of a stage, in `DIR/<stage>/data`."""
ROWS_PER_BATCH = 1024

T = TypeVar("T")
BoolArray = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True)
class SftRow:
    """ids: int32 [S]; loss_mask: bool [S], True where ids[i] is a target; dataset: the set that it is from."""

    ids: IntArray
    loss_mask: BoolArray
    dataset: str = ""


@dataclass(frozen=True)
class GroupRow:
    """sequences: prompt + reply + end token of each reply, int32 [S_i], best first."""

    id: str
    sequences: tuple[IntArray, ...]
    dataset: str = ""


class TokenRows(Sequence[T], Generic[T]):
    """The rows of a file, each built when it is asked for."""

    def __init__(self, table: pa.Table, build: Callable[..., T]) -> None:
        self._table, self._build = table, build

    def __len__(self) -> int:
        return len(self._table)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        return self._build(*(column[index] for column in self._table.columns))

    @property
    def datasets(self) -> list[str]:
        """The data set of each row."""
        return list(self._table["dataset"].to_pylist())


_INTS = pa.list_(pa.int32())
_SFT = pa.schema([("ids", _INTS), ("loss_mask", pa.list_(pa.bool_())), ("dataset", pa.string())])
_GROUPS = pa.schema([("id", pa.string()), ("sequences", pa.list_(_INTS)), ("dataset", pa.string())])


def write_threads(rows: Iterable[SftRow], file: Path) -> int:
    """Returns how many there were."""
    return _write(file, _SFT, ((row.ids, row.loss_mask, row.dataset) for row in rows))


def read_threads(file: Path) -> TokenRows[SftRow]:
    """Raises DataError when the file is missing or damaged."""

    def build(ids: pa.ListScalar, mask: pa.ListScalar, dataset: pa.StringScalar) -> SftRow:
        return SftRow(_copy(ids.values), _copy(mask.values), dataset.as_py())

    return TokenRows(_read(file), build)


def write_groups(rows: Iterable[GroupRow], file: Path) -> int:
    """Returns how many there were."""
    return _write(file, _GROUPS, ((row.id, list(row.sequences), row.dataset) for row in rows))


def read_groups(file: Path) -> TokenRows[GroupRow]:
    """Raises DataError when the file is missing or damaged."""

    def build(name: pa.StringScalar, sequences: pa.ListScalar, dataset: pa.StringScalar) -> GroupRow:
        return GroupRow(name.as_py(), tuple(_copy(ids.values) for ids in sequences), dataset.as_py())

    return TokenRows(_read(file), build)


def _copy(values: pa.Array) -> Any:
    """A writable numpy array."""
    return np.array(values.to_numpy(zero_copy_only=False))


def _write(file: Path, schema: pa.Schema, rows: Iterator[tuple[Any, ...]]) -> int:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    count = 0
    with pa.ipc.new_file(str(temporary), schema) as writer:
        while some := list(islice(rows, ROWS_PER_BATCH)):
            count += len(some)
            columns = [pa.array(column, field.type) for column, field in zip(zip(*some, strict=True), schema, strict=True)]
            writer.write_batch(pa.record_batch(columns, schema=schema))
    os.replace(temporary, file)
    return count


def _read(file: Path) -> pa.Table:
    try:
        return pa.ipc.open_file(pa.memory_map(str(file))).read_all()
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{file}: token cache cannot be read ({error}); delete it, it is built again") from error
