"""The base of every config class: frozen, no unknown keys, a docstring under every field; and the types of fields that name files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """Immutable and strict; field docstrings become descriptions (`--help` prints them)."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)


@dataclass(frozen=True)
class PathMark:
    """On a text that names a file or folder. written: it need not be there yet."""

    written: bool


InputPath = Annotated[str, PathMark(written=False)]
"""A file or folder that is read, or what a field takes in place of one: a glob, a URL, a hub name, a built-in model."""
OutputPath = Annotated[str, PathMark(written=True)]
"""A file or folder that is written."""
