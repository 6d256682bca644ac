"""What stands behind the names in `data.columns`: a column, a path into one, or a text put together from several."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from app.errors import DataError

_FIELD = re.compile(r"\{([^{}]+)\}")


def look_up(row: Mapping[str, Any], name: str | tuple[str, ...]) -> Any:
    """The entry of a row behind a name, None where it is null: a column (`answer`), a path into one (`answers.text.0`), or a template
    (`{context}\\n\\n{question}`), whose fields are columns or paths that hold text, numbers or lists of texts. Several names give a list.

    >>> row = {"question": "Why?", "answers": {"text": ["Because.", "So."]}}
    >>> look_up(row, "answers.text.0"), look_up(row, "Answer: {question}"), look_up(row, ("question", "answers.text.1"))
    ('Because.', 'Answer: Why?', ['Why?', 'So.'])

    Raises DataError where the row has no such column or entry, or a field of a template is empty or no text.
    """
    if isinstance(name, tuple):
        return [look_up(row, part) for part in name]
    if name in row:
        return row[name]
    if _FIELD.search(name):
        return _FIELD.sub(lambda field: _as_text(look_up(row, field[1]), field[1]), name)
    return _follow(row, name)


@cache
def columns_of(name: str | tuple[str, ...]) -> frozenset[str]:
    """The columns that a name looks into.

    >>> sorted(columns_of(("{a} {b.0}", "c")))
    ['a', 'b', 'b.0', 'c']
    """
    parts = name if isinstance(name, tuple) else (name,)
    fields = [field for part in parts for field in _FIELD.findall(part) or (part,)]
    return frozenset(column for field in fields for column in (field, field.partition(".")[0]))


def _follow(row: Mapping[str, Any], path: str) -> Any:
    here: Any = row
    for part in path.split("."):
        if isinstance(here, Mapping) and part in here:
            here = here[part]
        elif isinstance(here, list) and part.isdecimal() and int(part) < len(here):
            here = here[int(part)]
        else:
            there = f"; the row has {', '.join(map(str, row))}" if here is row else f": nothing at {part!r}"
            raise DataError(f"no column {path!r}{there}")
    return here


def _as_text(value: Any, name: str) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(item, str) for item in value):
        value = " ".join(value)
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf"):
        value = str(value)
    if not isinstance(value, str):
        raise DataError(f"`{name}` is {'missing' if value is None else 'no text'}")
    if not value.strip():
        raise DataError(f"`{name}` is empty")
    return value
