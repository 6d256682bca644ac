"""Replies scored in this process, on the GPU where there is one."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from app.config.recipe import Recipe
from app.config.serving import ModelKind
from app.evaluation.progress import progress
from app.evaluation.reply_scores import Replies
from app.models.context import context_of, require_context
from app.models.heads import check_reward_model
from app.models.load import check_model_folder
from app.models.replies import ReplyEncoder
from app.models.scoring import ScoringModel


def compute_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check_scorer(path: str, recipe: Recipe, kind: ModelKind = "reward") -> None:
    """Raises ModelError for a folder that is no such model, ConfigError where it takes no data.max_length tokens. Loads no weights."""
    if kind == "reward":
        check_reward_model(path, recipe.model.trust_remote_code)
    else:
        check_model_folder(path, chat_template=False)
    require_context(context_of(path), recipe.data.max_length, "data.max_length")


def reply_encoder(path: str, recipe: Recipe) -> ReplyEncoder:
    """With a model's tokenizer, data.template and data.max_length."""
    return ReplyEncoder.of(path, recipe.data.template, recipe.data.max_length, trust_remote_code=recipe.model.trust_remote_code)


def load_scorer(path: str, recipe: Recipe, kind: ModelKind = "reward") -> ScoringModel:
    """The model of a folder on this process's device, in model.precision."""
    config = recipe.model
    return ScoringModel(path, kind, precision=config.precision, trust_remote_code=config.trust_remote_code, device=compute_device())


class LocalScorer:
    """`ReplyScorer` over a reward-model folder; scores are logit - reward_offset. The model is loaded when something is scored.

    recipe: data.template and data.max_length (how replies are written and cut, as in training), model.precision,
    scoring.max_batch_tokens. Raises what `check_scorer` raises.
    """

    def __init__(self, path: str, recipe: Recipe) -> None:
        check_scorer(path, recipe)
        self._path, self._recipe = path, recipe
        self._encoder = reply_encoder(path, recipe)

    def score(self, replies: Sequence[Replies]) -> list[list[float]]:
        """Every reply behind its conversation, batched by length. Shows progress."""
        sequences = [[encoded.ids for encoded in self._encoder.encode(conversation, texts)] for conversation, texts in replies]
        flat = [ids for part in sequences for ids in part]
        model = load_scorer(self._path, self._recipe)
        with progress("scores", len(flat)) as advance:
            scores = iter(model.answers(flat, self._recipe.scoring.max_batch_tokens, advance))
        return [[float(next(scores)[0]) for _ in part] for part in sequences]
