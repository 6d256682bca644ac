"""What every command that takes a recipe has in common."""

from __future__ import annotations

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
