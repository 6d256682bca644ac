"""Recipes from TOML files and command-line overrides.

Files named in `extends` are layered left to right, the recipe itself over them, overrides over all. Every problem is a
ConfigError of one line that names the file or option, the dotted key, the reason and the remedy.
"""

from __future__ import annotations

import copy
import difflib
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from app.config.keys import RecipeKey, find_key, is_section, nearest_key, recipe_keys
from app.config.recipe import Recipe
from app.config.search_space import check_searchable, corners, differs_by_trial, points, sample
from app.config.tune import POPULATION
from app.config.unread import check_unread, reason_unread
from app.errors import ConfigError

_NULL = "null"  # TOML has no null; this string stands for it where a key admits none


@dataclass(frozen=True)
class Setting:
    """A value of one recipe key, and where it was given."""

    value: Any
    source: str


Settings = dict[str, Setting]


def load_recipe(path: str | Path | None, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in the TOML file `path` (None: nothing but defaults), with overrides such as `["--ppo.kl.coef=0.05"]`.

    Raises ConfigError for a missing or malformed file, an unknown key, a wrong type or a value out of range."""
    settings = {} if path is None else _read(Path(path), ())
    settings.update(parse_overrides(overrides, settings))
    recipe = _build(settings, "command line" if path is None else str(path))
    check_unread(recipe, {key: setting.source for key, setting in settings.items()})
    _check_space(recipe, settings)
    return recipe


def with_values(recipe: Recipe, values: Mapping[str, Any], source: str = "values") -> Recipe:
    """A copy of `recipe` with some dotted keys set, checked as a whole. Raises ConfigError.

    No preset: its values stand in the recipe as if each had been given, and would win over another preset's."""
    for name in values:
        if name.endswith(".preset"):
            raise ConfigError(f"{source}: {name} cannot be varied: vary the keys that the presets set, such as zero_stage")
    settings = {key: Setting(value, source) for key, value in resolved(recipe).items()}
    for name, value in values.items():
        key = _known(name, source)
        inside = name.removeprefix(f"{key.name}.")
        settings[key.name] = Setting(value if name == key.name else _inside_table(key, inside, value, settings), source)
    return _build(settings, source)


def resolved(recipe: Recipe) -> dict[str, Any]:
    """Every dotted key with its value, plain Python objects."""
    tree = recipe.model_dump(mode="json")
    out = {}
    for name in recipe_keys():
        value: Any = tree
        for part in name.split("."):
            value = value[part]
        out[name] = value
    return out


def to_toml(recipe: Recipe) -> str:
    """The resolved recipe as TOML with dotted keys, one a line, those that nothing reads as comments; `load_recipe` reads it back."""

    def line(name: str, value: Any) -> str:
        reason = reason_unread(recipe, name)
        return f"# {name} = {toml_value(value)}  (not read: {reason})\n" if reason else f"{name} = {toml_value(value)}\n"

    return "".join(line(name, value) for name, value in resolved(recipe).items())


def toml_value(value: Any) -> str:
    """A value as TOML on one line; entries of a table that are None are left out."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {toml_value(v)}" for k, v in value.items() if v is not None) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    return json.dumps(_NULL if value is None else value)


def recipe_files(path: str | Path) -> list[str]:
    """A recipe and all that it extends, at any depth, by the paths that name them. Raises ConfigError for one that cannot be read."""
    files = [str(path)]
    for name in _parse_file(Path(path)).get("extends", []):
        files += recipe_files(Path(path).parent / name)
    return files


def _read(path: Path, parents: tuple[Path, ...]) -> Settings:
    """The settings of a recipe file, those of the files it extends underneath."""
    document = _parse_file(path)
    extends = document.pop("extends", [])
    if not isinstance(extends, list) or not all(isinstance(name, str) for name in extends):
        raise ConfigError(f'{path}: extends must be a list of file names, such as extends = ["base.toml"]')
    chain = (*parents, path.resolve())
    settings: Settings = {}
    for name in extends:
        base = path.parent / name
        if base.resolve() in chain:
            raise ConfigError(f"{path}: extends leads back to {base}: remove one of the two extends")
        settings.update(_read(base, chain))
    for key, value in _flatten(document, str(path)):
        settings[key] = Setting(value, str(path))
    return settings


def _parse_file(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: malformed TOML: {error}: mend that line") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}): save the recipe as UTF-8") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{path}: is a folder, not a recipe{_suggest(path / '_')}") from error
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such recipe{_suggest(path)}") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}: check the path and its permissions") from error


def _suggest(path: Path) -> str:
    """The recipes nearest to a path that is not there."""
    folder = next((parent for parent in path.parents if parent.is_dir()), Path())
    here = [file for file in sorted(folder.glob("*.toml")) if _is_recipe(file)]
    below = () if here else (file for depth in range(1, 4) for file in sorted(folder.glob(f"{'*/' * depth}*.toml")))
    there = here or [file for file in below if not file.relative_to(folder).parts[0].startswith(".") and _is_recipe(file)]
    near = difflib.get_close_matches(str(path), map(str, there), n=1, cutoff=0.5)
    if near:
        return f": did you mean {near[0]}?"
    paths = ", ".join(map(str, there[:8]))
    return f": there {'are' if len(there) > 1 else 'is'} {paths}" if paths else ": give the path of a .toml file"


def _is_recipe(file: Path) -> bool:
    """Whether a file has nothing but sections of a recipe; `pyproject.toml` has others."""
    try:
        return tomllib.loads(file.read_text(encoding="utf-8")).keys() <= {"extends", *Recipe.model_fields}
    except (OSError, ValueError):  # no file, or no TOML
        return False


def _flatten(table: Mapping[str, Any], source: str, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Leaf keys of a nested table. Raises ConfigError for keys that the recipe does not have."""
    for part, value in table.items():
        name = ".".join((*path, part))
        misspelt_section = value and find_key(name) is None
        if isinstance(value, dict) and (is_section(name) or misspelt_section):
            yield from _flatten(value, source, (*path, part))
        else:
            yield _known(name, source).name, value


def _known(name: str, source: str) -> RecipeKey:
    key = find_key(name)
    if key is not None:
        return key
    if is_section(name):
        inside = [key for key in recipe_keys() if key.startswith(f"{name}.")]
        raise ConfigError(f"{source}: {name} is a section and takes no value: set one of its keys, such as {inside[0]}")
    near = nearest_key(name)
    remedy = f"did you mean {near}?" if near else "`corral pipeline --help` lists all keys"
    raise ConfigError(f"{source}: unknown key {name}: {remedy}")


def parse_overrides(arguments: Sequence[str], base: Mapping[str, Setting]) -> Settings:
    """Settings of `--dotted.key=value` and `--dotted.key value`; values are read as TOML, what is no TOML is a string.

    An entry of a free table is added to the table that `base` has."""
    settings: Settings = {}
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("--"):
            raise ConfigError(f"unexpected argument {argument!r}: overrides are written --dotted.key=value")
        name, given, text = argument[2:].partition("=")
        key = _known(name, "command line")
        if not given:
            following = next(rest, None)
            if following is None or following.startswith("--"):
                raise ConfigError(f"command line: --{name} has no value: write --{name}=VALUE")
            text = following
        value = _parse_value(text, name, key)
        if name != key.name:
            value = _inside_table(key, name.removeprefix(f"{key.name}."), value, {**base, **settings})
        settings[key.name] = Setting(value, f"command line: --{name}")
    return settings


def _parse_value(text: str, name: str, key: RecipeKey) -> Any:
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    leaf = key.leaf(name)
    if leaf is None:
        return value
    # a folder called 5 is still a string, and one word a list of one; several in one are left to be refused
    readings = [value, text, *([] if "," in text or not text else [[value], [text]])]
    return next((reading for reading in readings if leaf.accepts(reading)), value)


def _inside_table(key: RecipeKey, inner: str, value: Any, settings: Settings) -> dict[str, Any]:
    """The table of `key` with one more entry; several overrides may fill one table."""
    there = settings[key.name].value if key.name in settings else None
    table: dict[str, Any] = copy.deepcopy(there) if isinstance(there, dict) else {}
    parts = _path_inside(key, inner, table)
    target = table
    for part in parts[:-1]:
        target = target.setdefault(part, {})
    target[parts[-1]] = value
    return table


def _path_inside(key: RecipeKey, inner: str, table: Mapping[str, Any]) -> list[str]:
    """The parts of a dotted name behind `key`. An entry that is there may have dots in its own name, as a served model may."""
    if not key.is_nested_table:
        return [inner]
    entry = max((name for name in table if inner.startswith(f"{name}.")), key=len, default=None)
    return inner.split(".") if entry is None else [entry, *inner.removeprefix(f"{entry}.").split(".")]


def _build(settings: Settings, source: str) -> Recipe:
    tree: dict[str, Any] = {}
    for name, setting in settings.items():
        *sections, leaf = name.split(".")
        table = tree
        for part in sections:
            table = table.setdefault(part, {})
        admits_none = type(None) in get_args(recipe_keys()[name].annotation)
        table[leaf] = None if setting.value == _NULL and admits_none else setting.value
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_describe(error, settings, source)) from error


def _describe(error: ValidationError, settings: Settings, source: str) -> str:
    """One line about the first problem."""
    problems = error.errors(include_url=False)
    first = next((problem for problem in problems if problem["type"] == "extra_forbidden"), problems[0])  # it explains a missing one
    *around, last = first["loc"] or ("",)
    in_list = isinstance(last, int)  # the number of an entry that is no table
    path = ".".join(str(part) for part in (around if in_list else first["loc"]))
    reason = first["msg"].removeprefix("Value error, ")
    key = find_key(path)
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if key is None:  # a rule about a whole section; it carries its own remedy
        return f"{source}: {f'{path}: ' if path else ''}{reason}{more}"
    where = settings[key.name].source if key.name in settings else source
    entries = key.entry or key.section
    if first["type"] == "extra_forbidden" and entries is not None:
        near = difflib.get_close_matches(str(first["loc"][-1]), entries.model_fields, n=1)
        return f"{where}: unknown key {path}: {f'did you mean {near[0]}?' if near else ', '.join(entries.model_fields)}{more}"
    if key.section is not None and first["type"] == "value_error":  # a rule about a whole section, again
        return f"{where}: {path}: {reason}{more}"
    if isinstance(last, int) and key.name == path and path in settings:
        reason = f"entry {last + 1}: {reason[0].lower() + reason[1:]}"
        return f"{where}: {path} = {json.dumps(settings[path].value)}: {reason}; default: {toml_value(key.default)}{more}"
    if first["type"] == "missing":
        return f"{where}: {path} is required: set it too{more}"
    value = json.dumps(first["input"], default=str)
    if first["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return f"{where}: {path} = {value}: {_no_table(key, path)}{more}"
    leaf = key.leaf(path)
    if first["type"] == "tuple_type":
        reason = f"should be a {(leaf or key).choices or 'list'}, in brackets"
    default = f"; default: {toml_value(leaf.default)}" if leaf else ""  # what a free table holds has none that is known here
    return f"{where}: {path} = {value}: {reason[0].lower() + reason[1:]}{default}{more}"


def _no_table(key: RecipeKey, path: str) -> str:
    """What is wrong with a value where a table is needed, and how it is set."""
    inner = next(key.inside(path.removeprefix(f"{key.name}.") if path != key.name else "NAME"), None)
    last = path.rpartition(".")[2]
    if key.entry is not None and path != key.name and last in key.entry.model_fields:
        return f"a name of your own comes first: did you mean {key.name}.NAME.{last}?"
    return f"should be a table{f': set its keys, such as {inner.name}' if inner else ''}"


def _check_space(recipe: Recipe, settings: Settings) -> None:
    """Every domain of `tune.space` must name a recipe key and hold values that the key takes, in a configuration that may be drawn."""
    source = settings["tune.space"].source if "tune.space" in settings else "recipe"
    for name in recipe.tune.space:
        _known(name, f"{source}: tune.space")
        if not differs_by_trial(name):
            raise ConfigError(
                f"{source}: tune.space: {name} is the same for all trials, which share models, scoring service and size: leave it out"
            )
    check_searchable(recipe.tune, recipe.ppo.steps, carries_over=recipe.ppo.carry_over > 0)
    for name, alone, whole in corners(recipe.tune.space):
        try:
            with_values(recipe, {key: value for key, value in whole.items() if key != name} | {name: whole[name]}, f"{source}: tune.space")
        except ConfigError:
            with_values(recipe, alone, f"{source}: tune.space")
    if recipe.tune.space:
        _check_combinations(recipe, source)


def _check_combinations(recipe: Recipe, source: str) -> None:
    """The values of a configuration must go together: in every one that is known before the search, and in a sample of those that Optuna
    or a population may come to."""
    config = recipe.tune
    configurations: dict[str, Mapping[str, Any]] = {}
    if config.searcher != "optuna":
        known = points(config, recipe.run.seed)
        configurations |= {f"trial {number} of {len(known)}": values for number, values in enumerate(known, 1)}
    if config.searcher == "optuna" or config.scheduler in POPULATION:
        configurations |= {f"what may be drawn ({number})": values for number, values in enumerate(sample(config.space), 1)}
    for which, values in configurations.items():
        try:
            with_values(recipe, values, f"{source}: tune.space")
        except ConfigError as error:
            together = ", ".join(f"{name} = {toml_value(value)}" for name, value in values.items())
            raise ConfigError(
                f"{error}; this is {which}, with {together}: list values that all go together, or tie them to each other with `when`"
            ) from error
