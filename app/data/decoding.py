"""From the bytes of a line to a row of valid JSON, or to the reason why it is none."""

from __future__ import annotations

import json
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


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, where JSON would let the last of two entries of one name win."""
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{twice!r} stands twice in one object")
    return mapping
