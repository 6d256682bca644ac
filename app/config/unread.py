"""Settings that the chosen algorithm does not read: given beside the choice, they would be ignored in silence."""

from __future__ import annotations

from collections.abc import Mapping

from app.config.recipe import Recipe
from app.errors import ConfigError

NAME = "ppo.algorithm.name"
COMMAND_LINE = "command line"


def check_unread(recipe: Recipe, sources: Mapping[str, str]) -> None:
    """Raises ConfigError for a key of another algorithm, or of a critic where there is none, that stands where the algorithm was chosen,
    on the command line or in `tune.space`. What a recipe inherits is left alone: changing the name alone must do.

    sources: where each given key comes from."""
    for key, source in sources.items():
        if source.startswith(COMMAND_LINE) or source == sources.get(NAME):
            _refuse(recipe, key, source)
    if NAME not in recipe.tune.space:
        for key in recipe.tune.space:
            _refuse(recipe, key, f"{sources.get('tune.space', 'recipe')}: tune.space")


def reason_unread(recipe: Recipe, key: str) -> str | None:
    """Why the chosen algorithm does not read `key`; None where it does."""
    return next((reason for prefix, reason in recipe.ppo.unread().items() if key.startswith(f"{prefix}.")), None)


def _refuse(recipe: Recipe, key: str, source: str) -> None:
    if reason := reason_unread(recipe, key):
        name = recipe.ppo.algorithm.name
        raise ConfigError(f"{source}: {key} is not read, {reason}: leave it out, or choose another {NAME} than {name}")
