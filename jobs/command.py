"""The two shapes of a command: those that take a recipe and train or serve, and tools with arguments of their own."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # reading a recipe's classes takes a second that `corral --help` need not spend
    from app.config.recipe import Recipe


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
    """A command with its own arguments. run: (arguments, overrides) -> exit code."""

    purpose: str
    details: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, list[str]], int]
