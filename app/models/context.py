"""How long a sequence a model takes, as far as that is known without loading it."""

from __future__ import annotations

from pathlib import Path

from app.errors import ConfigError
from app.planning.shapes import stored_json

EMBEDDED_CONTEXT = 512
"""Of the model that `model.path = "embedded"` builds."""


def context_of(path: str) -> int | None:
    """The context length that a local model folder's config names; None where nothing local says it. Raises ModelError for a damaged
    config."""
    if path == "embedded":
        return EMBEDDED_CONTEXT
    file = Path(path).expanduser() / "config.json"
    if not file.is_file():
        return None
    length = stored_json(file).get("max_position_embeddings")
    return length if isinstance(length, int) else None


def require_context(context: int | None, tokens: int, keys: str, model: str = "the model") -> None:
    """Raises ConfigError when sequences of `tokens`, which the recipe keys `keys` allow, are longer than the model takes. model: how the
    message calls it."""
    if context is not None and tokens > context:
        raise ConfigError(f"{keys} = {tokens} tokens, and {model}'s context is {context}: lower it, or take another model")
