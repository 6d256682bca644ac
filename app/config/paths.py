"""The files and folders that a config names, found by the types of its fields (`InputPath`, `OutputPath`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from pydantic.fields import FieldInfo

from app.schema import Config, PathMark


@dataclass(frozen=True)
class NamedPath:
    """key: dotted, such as `serving.models.judge.path`; value: one path, or several where the field takes more."""

    key: str
    value: str | tuple[str, ...]
    mark: PathMark

    @property
    def all(self) -> tuple[str, ...]:
        """As several, also where it is one."""
        return (self.value,) if isinstance(self.value, str) else self.value


def named_paths(config: Config, prefix: str = "") -> Iterator[NamedPath]:
    """Every path that is set to something else than its default, also those in free tables such as `reward.parts`; and every path that
    is written, whose default is a path as well."""
    for name, info in type(config).model_fields.items():
        value, key, mark = getattr(config, name), f"{prefix}{name}", path_mark(info)
        if isinstance(value, Config):
            yield from named_paths(value, f"{key}.")
        elif isinstance(value, Mapping):
            for entry, inside in value.items():
                if isinstance(inside, Config):
                    yield from named_paths(inside, f"{key}.{entry}.")
        elif mark is not None and value and (mark.written or value != info.default):
            yield NamedPath(key, value, mark)


def path_mark(info: FieldInfo) -> PathMark | None:
    """How a field is marked; None for one that holds no path."""
    return next((mark for mark in (*info.metadata, *_inside(info.annotation)) if isinstance(mark, PathMark)), None)


def _inside(annotation: Any) -> Iterator[Any]:
    """All that an annotation is made of, at any depth."""
    for part in get_args(annotation):
        yield part
        yield from _inside(part)
