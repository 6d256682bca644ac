"""Rows of a source, decoded as they come; lines that are no rows, and whatever else cannot be used, go to a quarantine file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from types import TracebackType

from app.config.data import SetConfig
from app.data.decoding import ARRAY, decode, is_open_array, other_kind
from app.data.source import read_lines
from app.errors import DataError
from app.formats import FORMATS, detect_format, format_of_columns
from app.formats.records import BadRow, Row

LOOKED_AT = 1000
"""Rows among which the first that a format recognises decides, where the format is not given."""


class Quarantine:
    """The file of rows that cannot be used, one {"file", "line", "reason", "text"} a line; a context manager.

    It replaces what an earlier reading left, so that it always belongs to the data as it is now; without bad rows there is none.
    strict: the first bad row is a DataError instead.
    """

    def __init__(self, file: Path, *, strict: bool) -> None:
        self.file, self.count, self.first_reason = file, 0, ""
        self._strict = strict

    def __enter__(self) -> Quarantine:
        self._temporary = self.file.with_suffix(".tmp")
        self._out = self._temporary.open("w", encoding="utf-8", errors="backslashreplace")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._out.close()
        if self.count:
            os.replace(self._temporary, self.file)
        else:
            self._temporary.unlink()
            self.file.unlink(missing_ok=True)

    def add(self, row: BadRow) -> None:
        """Raises DataError for a malformed row where the run is strict."""
        if self._strict and row.malformed:
            raise DataError(f"{row.file}:{row.line}: {row.reason}; mend the row, or set data.strict = false to leave it out")
        self.count += 1
        self.first_reason = self.first_reason or row.reason
        entry = {"file": row.file, "line": row.line, "reason": row.reason, "text": row.text}
        self._out.write(json.dumps(entry, ensure_ascii=False) + "\n")


class RowReader:
    """The decoded rows of one data set, once; undecodable lines go to `quarantine`, blank ones are skipped.

    format: as configured, or as the first rows look. count and sha256, over all lines, are complete when all rows have been read.
    Raises DataError where nothing can be read or no format is known.
    """

    def __init__(self, path: str, source: SetConfig, quarantine: Quarantine) -> None:
        self.count = 0
        self._digest = hashlib.sha256()
        self._path, self._source, self._quarantine = path, source, quarantine
        self._first: list[Row] = []
        self._rest = self._decode()
        self.format = self._format_name()

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def __iter__(self) -> Iterator[Row]:
        return chain(self._first, self._rest)

    def _decode(self) -> Iterator[Row]:
        bad_first: BadRow | None = None
        decoded = False
        for raw in read_lines(self._path, subset=self._source.subset, split=self._source.split, files=self._source.files):
            self._digest.update(raw.data)
            if not raw.data.strip():
                continue
            self.count += 1
            row = decode(raw)
            if isinstance(row, Row):
                decoded = True
                yield row
                continue
            if self.count == 1 and is_open_array(row):
                raise DataError(f"{row.file}: {ARRAY}")
            bad_first = bad_first or row
            self._quarantine.add(row)
        if bad_first is not None and not decoded:
            why = f"{bad_first.file}:{bad_first.line}: {bad_first.reason}"
            kind = other_kind(bad_first, self.count) if bad_first.reason.startswith("malformed") else "data.path must name JSON lines"
            raise DataError(f"{why}, and no other line is JSON either; {kind}")
        if not self.count:
            raise DataError(f"data.path = {self._path}: no rows in it; name a file with at least one row")

    def _format_name(self) -> str:
        if self._source.format != "auto":
            return self._source.format
        by_columns = format_of_columns(self._source.columns.named())
        for row in islice(self._rest, LOOKED_AT):
            self._first.append(row)
            name = by_columns or detect_format(row.value)
            if name is not None:
                return name
        first = self._first[0]
        if isinstance(first.value, list):
            raise DataError(f"{first.file}:{first.line}: {ARRAY}")
        keys = f" in a row of {', '.join(map(str, first.value))}" if isinstance(first.value, dict) else ""
        raise DataError(
            f"{first.file}:{first.line}: no known format ({', '.join(FORMATS)}){keys}; "
            "name the columns in data.columns, set data.format, or convert the rows"
        )
