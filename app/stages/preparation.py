"""What every stage starts from: the corpus, the base model with its tokenizer, and the chat template."""

from __future__ import annotations

from dataclasses import dataclass

from app.config.recipe import Recipe
from app.data.corpus import Corpus
from app.data.encoding import check_system_options
from app.data.templates import Template, build_template
from app.models.load import load_config, load_tokenizer, resolve_model
from app.run_folder import RunFolder
from app.run_layout import BASE


@dataclass(frozen=True)
class Prepared:
    """corpus: extracted and split; model_path: HF folder or hub name to start from; context: the longest sequence that the model
    takes, where its config says so; template: how conversations are written."""

    corpus: Corpus
    model_path: str
    context: int | None
    template: Template


def prepare(recipe: Recipe, run: RunFolder, corpus: Corpus) -> Prepared:
    """Complete the base model (weights, tokenizer, chat template) under the run folder. Raises ModelError, or ConfigError where the
    template cannot write what `data` asks for."""
    model_path = resolve_model(
        recipe.model, texts=corpus.train.texts(), seed=recipe.run.seed, folder=run.stage(BASE), for_oasst=recipe.data.template == "oasst"
    )
    template = build_template(recipe.data.template, load_tokenizer(model_path, recipe.model.trust_remote_code))
    check_system_options(template, recipe.data)
    config = load_config(model_path, recipe.model.trust_remote_code).get_text_config()
    return Prepared(corpus, model_path, getattr(config, "max_position_embeddings", None), template)
