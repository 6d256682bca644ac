"""Whether the model has the layers that a recipe freezes or puts adapters beside, before Ray starts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from app.config.loading import with_values
from app.config.recipe import Recipe
from app.config.search_space import corners
from app.config.shared import BUILT_IN_MODELS
from app.planning.placement import trained_sections

SEARCHED = ("ppo.freeze_layers", "ppo.lora")


def check_trained_layers(recipe: Recipe, command: str) -> None:
    """Raises ModelError that names the section. A model on the hub is looked at when it is loaded."""
    path = recipe.model.path
    if path not in BUILT_IN_MODELS and not Path(path).expanduser().exists():
        return
    for variant in _variants(recipe, command):
        chosen = [getattr(variant, section) for section in trained_sections(variant, command)]
        if any(config.lora or config.freeze_layers for config in chosen):
            from app.models.trainable import check_trained_sections  # loads transformers and peft

            check_trained_sections(variant, command, path)


def _variants(recipe: Recipe, command: str) -> Iterator[Recipe]:
    """The recipe, and where it is searched, with each value that decides what a trial trains."""
    if command != "tune" or not any(name.startswith(SEARCHED) for name in recipe.tune.space):
        yield recipe
        return
    for name, alone, _ in corners(recipe.tune.space):
        if name.startswith(SEARCHED):
            yield with_values(recipe, alone, "tune.space")
