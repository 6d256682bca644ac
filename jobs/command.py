"""The two shapes of a command: those that take a recipe and train or serve, and tools with arguments of their own."""

from __future__ import annotations

import argparse
import errno
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.errors import ConfigError

if TYPE_CHECKING:  # reading a recipe's classes takes a second that `corral --help` need not spend
    from rich.console import Console

    from app.config.recipe import Recipe


DRY_RUN = "print the resolved recipe, the derived sizes, the placement and what a run would be refused for, and stop"
"""Help of `--dry-run`."""


@dataclass(frozen=True)
class Command:
    """purpose: one line; details: what it reads and leaves; sections: the recipe sections it reads; run: does it."""

    purpose: str
    details: str
    example: str
    sections: tuple[str, ...]
    run: Callable[[Recipe], None]


@dataclass(frozen=True)
class Tool:
    """A command with its own arguments. run: (arguments, overrides) -> exit code; keys: the recipe keys and sections it also takes."""

    purpose: str
    details: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, list[str]], int]
    keys: tuple[str, ...] = ()


REFUSED_PATHS = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.EISDIR)
"""What the system may have against a path, in whatever place it is looked at."""


def refused_path(error: OSError) -> str | None:
    """What to tell of a path that the system refuses; None of anything else, which would be a mistake of ours."""
    if error.errno not in REFUSED_PATHS or error.filename is None:
        return None
    return f"{error.filename}: {error.strerror}: check the path and its permissions"


def tool_recipe(name: str, keys: Sequence[str], overrides: Sequence[str], values: Mapping[str, Any] | None = None) -> Recipe:
    """Defaults, the recipe keys given behind a tool's own arguments, and over both `values`, which stand for these arguments.

    Raises ConfigError for an option that is no recipe key, none of those that the tool reads, or one that an argument stands for.
    """
    from app.config.keys import find_key, section_keys
    from app.config.loading import load_recipe, with_values

    recipe = load_recipe(None, overrides)
    read = {key.name for key in section_keys(keys)}
    for word in overrides:
        if not word.startswith("--"):
            continue
        key = word.removeprefix("--").partition("=")[0]
        known = find_key(key)
        if known is None or known.name not in read:
            raise ConfigError(f"corral {name} does not read {key}: `corral {name} --help` lists what it takes")
        if key in (values or {}):
            raise ConfigError(f"corral {name} was given {key} beside the argument that stands for it: leave one of them out")
    return with_values(recipe, values or {}, f"corral {name}")


def output_path(path: str, *, folder: bool = False) -> Path:
    """Where a tool will write, a file or a folder, with the folders above it made. Raises ConfigError where nothing can be written."""
    target = Path(path).expanduser()
    holder = target if folder else target.parent
    try:
        holder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{path}: its folder cannot be made ({error.strerror}); give another path") from error
    try:
        tempfile.TemporaryFile(dir=holder).close()
    except OSError as error:
        raise ConfigError(f"{path}: its folder cannot be written ({error.strerror}); give another path") from error
    if target.is_dir() and not folder:
        raise ConfigError(f"{path}: is a folder; give the path of a file in it")
    return target


def console() -> Console:
    """For tables on standard output, without colours for numbers and without lines broken where it is no terminal."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True)


def quiet_loading() -> None:
    """No progress bars of transformers beside our own."""
    from transformers.utils import logging

    logging.disable_progress_bar()
