"""The base of every config class: frozen, no unknown keys, a docstring under every field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, model_validator


class Config(BaseModel):
    """Immutable and strict, numbers finite; field docstrings become descriptions (`--help` prints them).

    A section of which only some keys are given keeps the others as the default of its field has them, which need not be those of its
    class: `policy: OptimizerConfig = OptimizerConfig(eps=1e-5)` has that eps whatever else of it is set."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _over_default_sections(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        defaults = {name: field.default for name, field in cls.model_fields.items() if name in given and isinstance(field.default, Config)}
        chosen = {name: default.model_dump(exclude_unset=True) for name, default in defaults.items() if isinstance(given[name], Mapping)}
        return {**given, **{name: merge(values, given[name]) for name, values in chosen.items()}}


@dataclass(frozen=True)
class PathMark:
    """On a text that names a file or folder. written: it need not be there yet."""

    written: bool


InputPath = Annotated[str, PathMark(written=False)]
"""A file or folder that is read, or what a field takes in place of one: a glob, a URL, a hub name, a built-in model."""
OutputPath = Annotated[str, PathMark(written=True)]
"""A file or folder that is written."""


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the entries of `over`, which win; tables that both have are merged in the same way."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged
