"""Where rows come from: a file, a folder, a glob, a URL, or a data set on the Hugging Face hub."""

from __future__ import annotations

import codecs
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
CONVERTED = "refs/convert/parquet"
"""Where the hub keeps a parquet copy of sets whose own files only a script can read."""
_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


@dataclass(frozen=True)
class RawLine:
    """One line as it stands in its file; `line` counts from 1."""

    file: str
    line: int
    data: bytes


def local_files(path: str, key: str = "data.path") -> list[Path]:
    """The files that a local path names, sorted. key: what named it, for messages. Raises DataError when there are none."""
    here = Path(path).expanduser()
    if here.is_file():
        return [here]
    if here.is_dir():
        files = sorted(file for file in here.iterdir() if file.name.endswith(SUFFIXES))
        if not files:
            raise DataError(f"{key} = {path}: the folder holds no file ending in {', '.join(SUFFIXES)}; name a file or another folder")
        return files
    files = sorted(Path(name) for name in glob.glob(str(here), recursive=True))
    if not files:
        raise DataError(f"{key} = {path}: no such file, folder or glob; check the path (it is relative to {Path.cwd()})")
    return files


def is_hub_name(path: str) -> bool:
    """Whether a path that is no local file can only be meant as `owner/name` on the hub."""
    return bool(_HUB_NAME.fullmatch(path)) and not path.endswith(SUFFIXES) and not Path(path).exists()


def read_lines(path: str, *, subset: str | None = None, split: str | None = None, files: tuple[str, ...] = ()) -> Iterator[RawLine]:
    """Every line of every file behind `path`, in a fixed order; of a hub data set the given configuration, split (or several, joined
    by +) and files, else all splits of all files.

    Raises DataError when something cannot be read.
    """
    if "://" in path:
        yield from _read_url(path)
    elif is_hub_name(path):
        yield from _read_hub(path, subset, split, files)
    else:
        for file in local_files(path):
            opener: Callable[..., IO[bytes]] = gzip.open if file.name.endswith(".gz") else open  # type: ignore[assignment]
            try:
                with opener(file, "rb") as stream:
                    yield from _rows(str(file), stream)
            except DataError:
                raise
            except UNREADABLE as error:
                raise DataError(f"{file}: cannot be read ({error}); copy it again or name another file in data.path") from error


def _rows(name: str, stream: IO[bytes]) -> Iterator[RawLine]:
    """The lines of a file, or the rows of a parquet file as lines of JSON."""
    if not name.endswith(PARQUET):
        for number, line in enumerate(stream, 1):
            yield RawLine(name, number, line if number > 1 else _without_mark(line, name))
        return
    number = 0
    for batch in pq.ParquetFile(stream).iter_batches(batch_size=PARQUET_ROWS):
        for value in batch.to_pylist():
            number += 1
            yield RawLine(name, number, _as_json(value))


def _without_mark(line: bytes, name: str) -> bytes:
    """The first line of a file without UTF-8's byte-order mark. Raises DataError where the file is in another Unicode encoding."""
    encoding = next((name for mark, name in _MARKS if line.startswith(mark)), "UTF-16 or UTF-32" if b"\0" in line[:4] else None)
    if encoding:
        raise DataError(f"{name}: is in {encoding}, and data must be UTF-8; convert the file, as iconv does")
    return line.removeprefix(codecs.BOM_UTF8)


def _as_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, default=_plain).encode("utf-8", "surrogatepass")


def _plain(value: Any) -> Any:
    """What parquet and JSON do not share: dates and decimals as text, bytes as the text that they are, or as no text."""
    if not isinstance(value, bytes):
        return str(value)
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return {"bytes": len(value)}


def _read_url(url: str) -> Iterator[RawLine]:
    import fsspec

    try:
        for file in fsspec.open_files(url, "rb", compression="infer"):
            with file as stream:
                yield from _rows(file.full_name, stream)
    except DataError:
        raise
    except (*UNREADABLE, ImportError) as error:
        raise DataError(f"data.path = {url}: cannot be read ({error}); check the address, or download it and name the file") from error


def _read_hub(name: str, subset: str | None, split: str | None, files: tuple[str, ...]) -> Iterator[RawLine]:
    import datasets

    try:
        loaded = datasets.load_dataset(name, subset, split=split, data_files=list(files) or None)
    except (OSError, ValueError, RuntimeError) as error:
        if "scripts are no longer supported" in str(error):
            for part in (split or "*").split("+"):
                yield from _read_url(f"hf://datasets/{name}@{CONVERTED}/{subset or '*'}/{part}/*.parquet")
            return
        reason = str(error).splitlines()[0]
        raise DataError(
            f"data.path = {name}: no local file of this name, and the hub did not give a data set ({reason}); check the path or the network"
        ) from error
    number = 0
    for rows in [loaded] if split is not None else [loaded[part] for part in sorted(loaded)]:
        for value in rows:
            number += 1
            yield RawLine(name, number, _as_json(value))
