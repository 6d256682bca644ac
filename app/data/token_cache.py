"""Tokenised rows of the three stages in parquet files, so that workers read ids instead of tokenising text."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from app.errors import DataError
from app.experience import IntArray, Prompt

TRAIN_FILE, HELD_OUT_FILE = "train.parquet", "validation.parquet"
"""Token caches of a stage, in `DIR/<stage>/data`."""

BoolArray = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True)
class SftRow:
    """ids: int32 [S]; loss_mask: bool [S], True where ids[i] is a target."""

    ids: IntArray
    loss_mask: BoolArray


@dataclass(frozen=True)
class GroupRow:
    """sequences: prompt + reply + end token of each reply, int32 [S_i], best first."""

    id: str
    sequences: tuple[IntArray, ...]


_INTS = pa.list_(pa.int32())


def write_threads(rows: Sequence[SftRow], file: Path) -> None:
    """Columns ids list<int32>, loss_mask list<bool>."""
    masks = pa.array([row.loss_mask for row in rows], pa.list_(pa.bool_()))
    _write(file, {"ids": pa.array([row.ids for row in rows], _INTS), "loss_mask": masks})


def read_threads(file: Path) -> list[SftRow]:
    """Raises DataError when the file is missing or damaged."""
    table = _read(file)
    masks = _lists(table["loss_mask"])
    return [SftRow(ids, mask.astype(np.bool_)) for ids, mask in zip(_lists(table["ids"]), masks, strict=True)]


def write_groups(rows: Sequence[GroupRow], file: Path) -> None:
    """Columns id string, sequences list<list<int32>>."""
    sequences = pa.array([list(row.sequences) for row in rows], pa.list_(_INTS))
    _write(file, {"id": pa.array([row.id for row in rows], pa.string()), "sequences": sequences})


def read_groups(file: Path) -> list[GroupRow]:
    """Raises DataError when the file is missing or damaged."""
    table = _read(file)
    return [
        GroupRow(name, tuple(np.array(ids, np.int32) for ids in sequences))
        for name, sequences in zip(table["id"].to_pylist(), table["sequences"].to_pylist(), strict=True)
    ]


def write_prompts(rows: Sequence[Prompt], file: Path) -> None:
    """Columns id string, text string, ids list<int32>, messages string (JSON)."""
    _write(
        file,
        {
            "id": pa.array([row.id for row in rows], pa.string()),
            "text": pa.array([row.text for row in rows], pa.string()),
            "ids": pa.array([row.ids for row in rows], _INTS),
            "messages": pa.array([json.dumps([dict(message) for message in row.messages]) for row in rows], pa.string()),
        },
    )


def read_prompts(file: Path) -> list[Prompt]:
    """Raises DataError when the file is missing or damaged."""
    table = _read(file)
    columns = zip(table["id"].to_pylist(), table["text"].to_pylist(), _lists(table["ids"]), table["messages"].to_pylist(), strict=True)
    return [Prompt(name, text, ids, tuple(json.loads(messages))) for name, text, ids, messages in columns]


def _lists(column: pa.ChunkedArray) -> list[Any]:
    """One writable numpy array per row of a list column."""
    return [np.array(row.values.to_numpy(zero_copy_only=False)) for row in column]


def _write(file: Path, columns: dict[str, pa.Array]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    pq.write_table(pa.table(columns), temporary)
    os.replace(temporary, file)


def _read(file: Path) -> pa.Table:
    try:
        return pq.read_table(file)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{file}: token cache cannot be read ({error}); delete it, it is built again") from error
