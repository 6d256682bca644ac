"""A reward model in this process, on the GPU where there is one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from app.config.recipe import Recipe
from app.data.encoding import join_reply
from app.data.templates import build_template
from app.errors import ScoringError
from app.evaluation.progress import progress
from app.evaluation.reply_scores import Replies
from app.evaluation.sampling_report import Conversation
from app.experience import IntArray
from app.models.context import context_of, require_context
from app.models.forward import pad_sequences, padded_batches
from app.models.heads import check_reward_model, load_reward_model, reward_offset, sequence_scores
from app.models.load import load_tokenizer


def compute_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check_scorer(path: str, recipe: Recipe) -> None:
    """Raises ModelError for a folder that is no reward model, ConfigError where it takes no data.max_length tokens. Loads no weights."""
    check_reward_model(path, recipe.model.trust_remote_code)
    require_context(context_of(path), recipe.data.max_length, "data.max_length")


class LocalScorer:
    """`ReplyScorer` over a reward-model folder; scores are logit - reward_offset. The model is loaded when something is scored.

    recipe: data.template and data.max_length (how replies are written and cut, as in training), model.precision,
    scoring.max_batch_tokens. Raises what `check_scorer` raises.
    """

    def __init__(self, path: str, recipe: Recipe) -> None:
        check_scorer(path, recipe)
        self._path, self._recipe = path, recipe
        self._template = build_template(recipe.data.template, load_tokenizer(path, recipe.model.trust_remote_code))

    def score(self, replies: Sequence[Replies]) -> list[list[float]]:
        """Every reply behind its conversation, batched by length. Shows progress."""
        sequences = [self._sequences(conversation, texts) for conversation, texts in replies]
        scores = iter(self._scores([sequence for part in sequences for sequence in part]))
        return [[next(scores) for _ in part] for part in sequences]

    def _sequences(self, conversation: Conversation, texts: Sequence[str]) -> list[IntArray]:
        prompt, _ = self._template.encode(conversation, open_assistant=True)
        length = self._recipe.data.max_length
        return [join_reply(prompt, self._template.encode_text(text), self._template.eos_id, length) for text in texts]

    @torch.inference_mode()
    def _scores(self, sequences: Sequence[IntArray]) -> list[float]:
        config, device = self._recipe.model, compute_device()
        model = load_reward_model(self._path, precision=config.precision, trust_remote_code=config.trust_remote_code)
        torch.nn.Module.to(model, device)  # in place
        scores = [math.nan] * len(sequences)
        with progress("scores", len(sequences)) as advance:
            for rows in padded_batches(sequences, self._recipe.scoring.max_batch_tokens):
                scores_B = sequence_scores(model, *pad_sequences([sequences[row] for row in rows], device)) - reward_offset(model)
                for row, score in zip(rows, scores_B.tolist(), strict=True):
                    scores[row] = score
                advance(len(rows))
        if not all(map(math.isfinite, scores)):
            raise ScoringError(f"{self._path}: computed NaN or infinity; check the model folder, or use --model.precision=fp32")
        return scores
