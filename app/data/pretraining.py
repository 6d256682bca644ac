"""The text of ppo.pretraining: read like any other data, all of it to train on."""

from __future__ import annotations

from pathlib import Path

from app.config.recipe import Recipe
from app.data.corpus import Corpus, load_corpus
from app.data.encoding import Cuts, encode_threads
from app.data.templates import Template
from app.data.token_cache import TRAIN_FILE, write_threads
from app.errors import DataError

NAME = "pretraining"
"""Of the data set, and of its folder under `DIR/data`."""


def load_pretraining(recipe: Recipe, folder: Path) -> Corpus:
    """The texts, in `train.threads`. Writes under `folder` what `load_corpus` does.

    Raises DataError, which names ppo.pretraining, where there is nothing to learn from.
    """
    try:
        data = recipe.data.model_copy(update={"sets": {NAME: recipe.ppo.pretraining.source}})
        corpus = load_corpus(data, seed=recipe.run.seed, folder=folder, split=False)
        if not corpus.train.threads:
            raise DataError(f"{corpus.path} ({corpus.format} format): no text or conversation in it; check path and format, or data.lang")
    except DataError as error:
        raise DataError(f"ppo.pretraining: {error}") from error
    return corpus


def write_pretraining(corpus: Corpus, template: Template, recipe: Recipe, folder: Path) -> Path:
    """The corpus as a token cache under `folder`, at most `data.max_length` tokens a row; returns its file. Raises DataError without
    any target to learn."""
    file, cuts = folder / TRAIN_FILE, Cuts()
    rows = write_threads(encode_threads(corpus.train.threads, template, recipe.data, recipe.run.seed, cuts), file)
    if not rows:
        raise DataError(f"ppo.pretraining: none of {cuts.left_out} texts of {corpus.path} has a token to learn; see data.train_on")
    return file
