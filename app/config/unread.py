"""Settings that the recipe's choices leave unread: given beside the choice, they would be ignored in silence."""

from __future__ import annotations

from collections.abc import Mapping

from app.config.ppo import Unread
from app.config.recipe import Recipe
from app.errors import ConfigError

COMMAND_LINE = "command line"


def check_unread(recipe: Recipe, sources: Mapping[str, str]) -> None:
    """Raises ConfigError for a key that nothing reads, as of another algorithm, or of a critic where there is none, and that stands where
    the choice was made, on the command line or in `tune.space`. What a recipe inherits is left alone: changing the choice alone must do.

    sources: where each given key comes from."""
    for key, source in sources.items():
        unread = _unread(recipe, key)
        if unread and (source.startswith(COMMAND_LINE) or source == sources.get(unread.choice)):
            raise _error(key, unread, source)
    for key in recipe.tune.space:
        unread = _unread(recipe, key)
        if unread and not {unread.choice, unread.or_choice} & recipe.tune.space.keys():
            raise _error(key, unread, f"{sources.get('tune.space', 'recipe')}: tune.space")


def reason_unread(recipe: Recipe, key: str) -> str | None:
    """Why nothing reads `key`; None where something does."""
    unread = _unread(recipe, key)
    return unread.reason if unread else None


def _unread(recipe: Recipe, key: str) -> Unread | None:
    return next((unread for prefix, unread in recipe.ppo.unread().items() if f"{key}.".startswith(f"{prefix}.")), None)


def _error(key: str, unread: Unread, source: str) -> ConfigError:
    return ConfigError(f"{source}: {key} is not read, {unread.reason}: leave it out, or choose another {unread.choice} than {unread.value}")
