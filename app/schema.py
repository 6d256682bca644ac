"""The base of every config class: frozen, no unknown keys, a docstring under every field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError


class Config(BaseModel):
    """Immutable and strict, numbers finite and no switches; field docstrings become descriptions (`--help` prints them).

    A section of which only some keys are given keeps the others as the default of its field has them, which need not be those of its
    class: `policy: OptimizerConfig = OptimizerConfig(eps=1e-5)` has that eps whatever else of it is set."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _numbers_and_default_sections(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        wrong = [name for name, field in cls.model_fields.items() if name in given and _is_switch(given[name], field.annotation)]
        if wrong:  # pydantic would take them for 0 and 1
            problem = PydanticCustomError("no_number", "should be a number, not true or false")
            raise ValidationError.from_exception_data(
                cls.__name__, [InitErrorDetails(type=problem, loc=(name,), input=given[name]) for name in wrong]
            )
        defaults = {name: field.default for name, field in cls.model_fields.items() if name in given and isinstance(field.default, Config)}
        chosen = {name: default.model_dump(exclude_unset=True) for name, default in defaults.items() if isinstance(given[name], Mapping)}
        return {**given, **{name: merge(values, given[name]) for name, values in chosen.items()}}


def _is_switch(value: Any, annotation: Any) -> bool:
    """Whether true or false stands where a number belongs, by itself or in a list.

    >>> [_is_switch(True, kind) for kind in (int | None, Literal[0, 1], int | bool, str, tuple[float, float])]
    [True, True, False, False, False]
    >>> _is_switch([0.9, False], tuple[float, float]), _is_switch([False], list[bool])
    (True, False)
    """
    parts = get_args(annotation) or (annotation,)
    if get_origin(annotation) in (list, tuple):
        return isinstance(value, list | tuple) and any(_is_switch(each, part) for each in value for part in parts)
    if not isinstance(value, bool) or get_origin(annotation) not in (None, Union, UnionType, Literal):
        return False
    kinds = {part if isinstance(part, type) else type(part) for part in parts}
    return bool(kinds & {int, float}) and bool not in kinds


@dataclass(frozen=True)
class PathMark:
    """On a text that names a file or folder. written: it need not be there yet."""

    written: bool


def known_home(path: str) -> str:
    """The path, unless it begins with the home of a user who has none: then ValueError.

    >>> known_home("~/runs"), known_home("runs/~")
    ('~/runs', 'runs/~')
    """
    in_home(path)
    return path


def in_home(path: str) -> str:
    """With a leading `~` written out, which a shell leaves alone behind `=`: a folder of that name would be made. ValueError as above."""
    if not path.startswith("~"):
        return path
    try:
        return str(Path(path).expanduser())
    except RuntimeError as error:
        raise ValueError(f"no user {path[1:].partition('/')[0]} has a home on this machine: write the path out") from error


InputPath = Annotated[str, PathMark(written=False), AfterValidator(known_home)]
"""A file or folder that is read, or what a field takes in place of one: a glob, a URL, a hub name, a built-in model."""
OutputPath = Annotated[str, PathMark(written=True), AfterValidator(in_home)]
"""A file or folder that is written."""
Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""Of random numbers: what every generator takes, numpy's and torch's."""


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the entries of `over`, which win; tables that both have are merged in the same way."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged
