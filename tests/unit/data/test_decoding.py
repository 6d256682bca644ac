"""Files as they come: encodings, byte-order marks, line ends, JSON that lies, parquet of several shapes, parts of hub sets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from app.data import source
from app.data.decoding import decode
from app.data.source import RawLine, read_lines
from app.errors import DataError
from app.formats import FORMATS
from app.formats.records import STORED, BadRow, Filters, Row, TreeRecords


def decoded(path: Path) -> list[Row | BadRow]:
    return [decode(raw) for raw in read_lines(str(path)) if raw.data.strip()]


def values(path: Path) -> list[Any]:
    return [found.value for found in decoded(path) if isinstance(found, Row)]


def reasons(path: Path) -> list[str]:
    return [found.reason for found in decoded(path) if isinstance(found, BadRow)]


def test_mark_line_ends_and_blank_lines(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'\xef\xbb\xbf"Why?"\r\n\r\n  \n"caf\xc3\xa9"\r\n"\xef\xbb\xbf"')
    assert values(file) == ["Why?", "café", "\ufeff"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_other_unicode_encodings_are_named(tmp_path: Path, encoding: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes('"Why?"\n"How?"\n'.encode(encoding))
    with pytest.raises(DataError, match=r"rows\.jsonl: is in UTF-(16|32).*must be UTF-8; convert"):
        decoded(file)
    with pytest.raises(DataError, match=r"rows\.jsonl: is in UTF-(16|32).*must be UTF-8; convert"):
        list(read_lines(f"file://{file}"))


def test_latin_1_is_named(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes('"Why?"\n"café"\n'.encode("latin-1"))
    assert values(file) == ["Why?"]
    assert reasons(file) == ["not UTF-8 (byte 4 is 0xe9, as in a Latin-1 or Windows-1252 file)"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "malformed JSON: 'c' stands twice in one object"),
        (b'{"n": ' + b"9" * 5000 + b"}", "malformed JSON: a number with too many digits"),
        (b"[" * 100_000, "malformed JSON: nested too deeply"),
        (b'{"a":' * 100_000, "malformed JSON: nested too deeply"),
        (b'"a\0b"', "malformed JSON: Invalid control character at at column 3"),
        (b"{'a': 1}", "malformed JSON: Expecting property name enclosed in double quotes at column 2"),
        (b'"a" "b"', "malformed JSON: Extra data at column 5"),
    ],
)
def test_reasons(line: bytes, reason: str) -> None:
    found = decode(RawLine("f", 3, line))
    assert isinstance(found, BadRow)
    assert (found.line, found.reason, found.malformed) == (3, reason, True)
    assert len(found.text) <= STORED + 40


def test_parquet_files_of_one_folder_may_differ(tmp_path: Path) -> None:
    tables = [{"prompt": ["Why?"], "response": ["So."]}, {"prompt": ["How?"], "n": [3]}, {"response": ["a"], "prompt": [b"Who?"]}]
    for number, columns in enumerate(tables):
        pq.write_table(pa.table(columns), tmp_path / f"part{number}.parquet")
    rows = [found for found in decoded(tmp_path) if isinstance(found, Row)]
    found = list(FORMATS["instruction"].read(rows, Filters()))
    assert [isinstance(item, TreeRecords) for item in found] == [True, False, True]
    assert isinstance(found[1], BadRow)
    assert found[1].file.endswith("part1.parquet")
    assert found[1].reason.startswith("not an object with a prompt and a response")


def test_parquet_bytes_that_are_no_text(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["Why?"], "response": [b"\xff\xfe"]}), tmp_path / "a.parquet")
    (row,) = decoded(tmp_path / "a.parquet")
    (bad,) = FORMATS["instruction"].read([row], Filters())
    assert isinstance(bad, BadRow)
    assert bad.reason == "`response` is no text"


def test_parts_of_hub_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(name: str, subset: str | None, split: str | None, data_files: list[str] | None) -> Any:
        asked.append((name, subset, split, data_files))
        return ["a", "b"] if split else {"validation": ["c"], "train": ["a", "b"]}

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert [json.loads(raw.data) for raw in read_lines("owner/name")] == ["a", "b", "c"]
    found = read_lines("owner/name", subset="en", split="train+test", files=("x.json",))
    assert [json.loads(raw.data) for raw in found] == ["a", "b"]
    assert asked == [("owner/name", None, None, None), ("owner/name", "en", "train+test", ["x.json"])]


def test_hub_sets_with_a_script_are_read_from_their_parquet_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, subset: str | None, split: str | None, data_files: list[str] | None) -> None:
        raise RuntimeError("Dataset scripts are no longer supported, but found name.py")

    def read_url(url: str) -> Iterator[RawLine]:
        yield RawLine(url, 1, b'"a"')

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(source, "_read_url", read_url)
    copy = "hf://datasets/owner/name@refs/convert/parquet"
    assert [raw.file for raw in read_lines("owner/name")] == [f"{copy}/*/*/*.parquet"]
    found = read_lines("owner/name", subset="pairs", split="train+validation")
    assert [raw.file for raw in found] == [f"{copy}/pairs/train/*.parquet", f"{copy}/pairs/validation/*.parquet"]
