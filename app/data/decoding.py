"""From the bytes of a line to a row of valid JSON, or to the reason why it is none."""

from __future__ import annotations

import json
from pathlib import PurePath
from typing import Any

from app.data.source import RawLine
from app.errors import DataError
from app.formats.records import BadRow, Row, set_aside


def decode(raw: RawLine) -> Row | BadRow:
    """One line of JSON."""
    text = raw.data.decode("utf-8", errors="replace").strip()
    row = Row(raw.file, raw.line, text, None)
    try:
        return Row(raw.file, raw.line, text, json.loads(raw.data.decode("utf-8").strip(), object_pairs_hook=_mapping))
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 (byte {error.start} is 0x{raw.data[error.start]:02x}, as in a Latin-1 or Windows-1252 file)"
    except json.JSONDecodeError as error:
        reason = f"malformed JSON: {error.msg} at column {error.colno}"
    except RecursionError:
        reason = "malformed JSON: nested too deeply"
    except DataError as error:
        reason = f"malformed JSON: {error}"
    except ValueError:  # what int() says of thousands of digits
        reason = "malformed JSON: a number with too many digits"
    return set_aside(row, reason)


ARRAY = "it is one JSON array: write one object a line, as `jq -c '.[]'` does"
DOCUMENT = "it is one JSON document over several lines: write one object a line, as `jq -c .` does"
TEXT = 'it is plain text: write one JSON object a line, such as {"text": "..."} or {"prompt": "..."}'
_TABLES = {".csv": "a CSV", ".tsv": "a TSV"}


def is_open_array(row: BadRow) -> bool:
    """Whether a line that is no JSON opens an array whose elements stand on the lines below: they are no rows."""
    return row.malformed and row.text.startswith("[") and row.text.rstrip(",")[-1:] in "[{}"


def other_kind(row: BadRow, lines: int) -> str:
    """What a file is that has so many lines, none of them JSON, and begins with `row`; and what to do."""
    suffix = PurePath(row.file.removesuffix(".gz")).suffix.lower()
    if row.text.startswith("["):
        return ARRAY
    if row.text.startswith("{"):
        return DOCUMENT if lines > 1 else "data.path must name JSON lines"
    if suffix in _TABLES:
        return f'it is {_TABLES[suffix]}: write one JSON object a line, such as {{"prompt": "...", "response": "..."}}, or parquet'
    return TEXT


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, where JSON would let the last of two entries of one name win."""
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{twice!r} stands twice in one object")
    return mapping
