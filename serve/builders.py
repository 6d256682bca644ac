"""Builders for Serve's own commands and config files: a recipe's keys in, an application out.

`serve run serve.builders:scoring serving.models.rm.path=runs/demo/rm/model` starts one; `corral serve build` writes the file for
`serve deploy`.
"""

from __future__ import annotations

from typing import Any

from ray import serve

from app.config.loading import load_recipe, with_values
from app.config.recipe import Recipe
from app.config.served_models import named_models
from serve.access import bearer_token
from serve.scoring import scoring_application


def scoring(arguments: dict[str, Any]) -> serve.Application:
    """The scoring service. arguments: recipe keys with their values, and `recipe`, a recipe file to start from. Raises ConfigError."""
    recipe = _recipe(arguments)
    return scoring_application(
        named_models(recipe),
        doors=recipe.serving,
        token=bearer_token(recipe.serving),
        precision=recipe.model.precision,
        trust_remote_code=recipe.model.trust_remote_code,
    )


def chat(arguments: dict[str, Any]) -> serve.Application:
    """Chat with the models of `serving.chat`; arguments and errors as in `scoring`."""
    from serve.chat import chat_application  # loads vLLM

    recipe = _recipe(arguments)
    return chat_application(
        recipe.serving,
        token=bearer_token(recipe.serving),
        precision=recipe.model.precision,
        trust_remote_code=recipe.model.trust_remote_code,
    )


def _recipe(arguments: dict[str, Any]) -> Recipe:
    """Text is read as on the command line, everything else as it is."""
    words = [f"--{key}={value}" for key, value in arguments.items() if isinstance(value, str) and key != "recipe"]
    values = {key: value for key, value in arguments.items() if not isinstance(value, str)}
    return with_values(load_recipe(arguments.get("recipe"), words), values, "arguments")
