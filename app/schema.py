"""The base of every config class: frozen, no unknown keys, a docstring under every field."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """Immutable and strict; field docstrings become descriptions (`--help` prints them)."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)
