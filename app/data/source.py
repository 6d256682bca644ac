"""Where rows come from: a file, a folder, a glob, a URL, or a data set on the Hugging Face hub."""

from __future__ import annotations

import glob
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow.parquet as pq

from app.errors import DataError

SUFFIXES = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz", ".parquet")
PARQUET = ".parquet"
PARQUET_ROWS = 1024  # held at a time
UNREADABLE = (OSError, EOFError, zlib.error, ValueError)  # pyarrow's errors are ValueErrors
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


@dataclass(frozen=True)
class RawLine:
    """One line as it stands in its file; `line` counts from 1."""

    file: str
    line: int
    data: bytes


def local_files(path: str) -> list[Path]:
    """The files that a local `data.path` names, sorted. Raises DataError when there are none."""
    here = Path(path).expanduser()
    if here.is_file():
        return [here]
    if here.is_dir():
        files = sorted(file for file in here.iterdir() if file.name.endswith(SUFFIXES))
        if not files:
            raise DataError(f"data.path = {path}: the folder holds no file ending in {', '.join(SUFFIXES)}; name a file or another folder")
        return files
    files = sorted(Path(name) for name in glob.glob(str(here), recursive=True))
    if not files:
        raise DataError(f"data.path = {path}: no such file, folder or glob; check the path (it is relative to {Path.cwd()})")
    return files


def is_hub_name(path: str) -> bool:
    """Whether a path that is no local file can only be meant as `owner/name` on the hub."""
    return bool(_HUB_NAME.fullmatch(path)) and not path.endswith(SUFFIXES) and not Path(path).exists()


def read_lines(path: str, *, subset: str | None = None, split: str | None = None) -> Iterator[RawLine]:
    """Every line of every file behind `path`, in a fixed order; of a hub data set the given configuration and split, else all splits.

    Raises DataError when something cannot be read.
    """
    if "://" in path:
        yield from _read_url(path)
    elif is_hub_name(path):
        yield from _read_hub(path, subset, split)
    else:
        for file in local_files(path):
            opener: Callable[..., IO[bytes]] = gzip.open if file.name.endswith(".gz") else open  # type: ignore[assignment]
            try:
                with opener(file, "rb") as stream:
                    yield from _rows(str(file), stream)
            except UNREADABLE as error:
                raise DataError(f"{file}: cannot be read ({error}); copy it again or name another file in data.path") from error


def _rows(name: str, stream: IO[bytes]) -> Iterator[RawLine]:
    """The lines of a file, or the rows of a parquet file as lines of JSON."""
    if not name.endswith(PARQUET):
        yield from (RawLine(name, number, line) for number, line in enumerate(stream, 1))
        return
    number = 0
    for batch in pq.ParquetFile(stream).iter_batches(batch_size=PARQUET_ROWS):
        for value in batch.to_pylist():
            number += 1
            yield RawLine(name, number, _as_json(value))


def _as_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass")


def _read_url(url: str) -> Iterator[RawLine]:
    import fsspec

    try:
        for file in fsspec.open_files(url, "rb", compression="infer"):
            with file as stream:
                yield from _rows(file.full_name, stream)
    except (*UNREADABLE, ImportError) as error:
        raise DataError(f"data.path = {url}: cannot be read ({error}); check the address, or download it and name the file") from error


def _read_hub(name: str, subset: str | None, split: str | None) -> Iterator[RawLine]:
    import datasets

    try:
        loaded = datasets.load_dataset(name, subset, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"data.path = {name}: no local file of this name, and the hub did not give a data set ({reason}); check the path or the network"
        ) from error
    number = 0
    for rows in [loaded] if split is not None else [loaded[part] for part in sorted(loaded)]:
        for value in rows:
            number += 1
            yield RawLine(name, number, _as_json(value))
