"""One planted mistake."""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """Replace `old` by `new` in `file`; `breaks` says what is then wrong; `tests` (files or folders) must fail."""

    kind: str
    file: str
    old: str
    new: str
    breaks: str
    tests: tuple[str, ...]
