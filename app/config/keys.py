"""The dotted keys of a recipe, read off the config classes: for `--help`, for overrides and for spelling suggestions."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic import TypeAdapter
from pydantic.fields import FieldInfo

from app.config.recipe import Recipe
from app.schema import Config


@dataclass(frozen=True)
class RecipeKey:
    """One leaf of the config tree, for example `ppo.kl.coef`. required: it has to be given where its section or entry is there, and
    `default` is None."""

    name: str
    annotation: Any
    default: Any
    description: str
    required: bool = False

    @property
    def is_table(self) -> bool:
        """The value is a table whose keys are free (`ppo.deepspeed.extra`, `tune.space`), or a section that may be absent."""
        return get_origin(self.annotation) is dict or self.section is not None

    @property
    def is_nested_table(self) -> bool:
        """A free table of tables: what follows the key in a dotted name is a path, not one name."""
        return self.annotation == dict[str, Any] or self.entry is not None

    @property
    def entry(self) -> type[Config] | None:
        """The config class of every entry of a free table; None where the entries are of no such class."""
        inside = get_args(self.annotation)[1] if get_origin(self.annotation) is dict else None
        inside = getattr(inside, "__origin__", inside)  # out of Annotated[...]
        return inside if isinstance(inside, type) and issubclass(inside, Config) else None

    @property
    def section(self) -> type[Config] | None:
        """The config class of a section that may be absent (`ppo.lora`); None for any other key."""
        return next((part for part in get_args(self.annotation) if isinstance(part, type) and issubclass(part, Config)), None)

    @property
    def choices(self) -> str:
        """The words that the value is chosen from, such as `fp32 | bf16 | fp16`; empty for a key that is not confined to some."""
        return _choices(self.annotation)

    def inside(self, entry: str = "NAME") -> Iterator[RecipeKey]:
        """The leaf keys of a section that may be absent, or of the `entry` of a free table, with the defaults that they have where it is
        there."""
        inside = self.entry or self.section
        path = (self.name, entry) if self.entry else (self.name,)
        for name, info in inside.model_fields.items() if inside else ():
            default = None if info.is_required() else info.get_default(call_default_factory=True)
            yield from _leaf(info, default, (*path, name))

    def leaf(self, name: str) -> RecipeKey | None:
        """The key of this name, which is this one or lies in its table; None where nothing is known of what lies there."""
        entry = name.removeprefix(f"{self.name}.").partition(".")[0]
        return next((leaf for leaf in (self, *self.inside(entry)) if leaf.name == name), None)

    def accepts(self, value: Any) -> bool:
        """Whether `value` has the key's type (its range is checked with the whole recipe)."""
        return not type_errors(self.annotation, value)


def _choices(annotation: Any) -> str:
    """
    >>> _choices(Literal["a", "b"] | None), _choices(tuple[Literal["a", "b"], ...]), _choices(int | None)
    ('a | b | null', 'list of a | b', '')
    """
    inside = get_args(annotation)
    if get_origin(annotation) is Literal:
        return " | ".join(map(str, inside))
    if get_origin(annotation) is tuple:
        return f"list of {_choices(inside[0])}" if _choices(inside[0]) else ""
    if get_origin(annotation) is dict or not any(map(_choices, inside)):
        return ""
    return " | ".join(_choices(part) or ("null" if part is NoneType else part.__name__) for part in inside)


def type_errors(annotation: Any, value: Any) -> bool:
    """Whether `value` is of another type than `annotation`."""
    try:
        TypeAdapter(annotation).validate_python(value)
    except ValueError:
        return True
    return False


@cache
def recipe_keys() -> dict[str, RecipeKey]:
    """Every leaf key of the recipe by its dotted name, in the order of the classes."""
    return {key.name: key for key in _leaves(Recipe(), ())}


def _leaves(config: Config, path: tuple[str, ...]) -> Iterator[RecipeKey]:
    for name, info in type(config).model_fields.items():
        yield from _leaf(info, getattr(config, name), (*path, name))


def _leaf(info: FieldInfo, value: Any, path: tuple[str, ...]) -> Iterator[RecipeKey]:
    if isinstance(value, Config):
        yield from _leaves(value, path)
    else:
        description, required = " ".join((info.description or "").split()), info.is_required() and value is None
        yield RecipeKey(".".join(path), info.annotation, value, description, required)


def section_keys(sections: Iterable[str]) -> list[RecipeKey]:
    """The leaf keys that have one of the given names, or stand in a section of that name, such as `ppo` or `ppo.kl`."""
    wanted = tuple(sections)
    return [key for key in recipe_keys().values() if any(f"{key.name}.".startswith(f"{name}.") for name in wanted)]


def is_section(name: str) -> bool:
    """Whether `name` is a table of the recipe, such as `ppo` or `ppo.kl`."""
    return any(key.startswith(f"{name}.") for key in recipe_keys())


def find_key(name: str) -> RecipeKey | None:
    """The recipe key that `name` is, or whose free table it lies in."""
    keys = recipe_keys()
    if name in keys:
        return keys[name]
    return next((key for key in keys.values() if key.is_table and name.startswith(f"{key.name}.")), None)


def nearest_key(name: str) -> str | None:
    """The recipe key spelt most like `name`; a key with the same last part wins over one that only looks alike."""
    keys = list(recipe_keys())
    last = name.rsplit(".", 1)[-1]
    same_last = [key for key in keys if key.rsplit(".", 1)[-1] == last]
    for candidates, cutoff in ((same_last, 0.0), (keys, 0.6)):
        matches = difflib.get_close_matches(name, candidates, n=1, cutoff=cutoff)
        if matches:
            return matches[0]
    near_last = difflib.get_close_matches(last, {key.rsplit(".", 1)[-1] for key in keys}, n=1, cutoff=0.7)
    return next((key for key in keys if near_last and key.rsplit(".", 1)[-1] == near_last[0]), None)
