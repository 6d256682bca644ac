"""Texts to mix into PPO: any format that SFT reads, all of it to train on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from app.config.loading import with_values
from app.config.recipe import Recipe
from app.data.pretraining import load_pretraining, write_pretraining
from app.data.templates import build_template
from app.data.token_cache import read_threads
from app.errors import DataError
from tests.tiny_models import make_tokenizer

TEXTS = [{"text": f"Passage {number} has some words."} for number in range(5)]
CHATS = [{"prompt": f"Question {number}?", "response": f"Answer {number}."} for number in range(5)]


def recipe_of(folder: Path, rows: list[dict[str, Any]], **values: Any) -> Recipe:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return with_values(Recipe(), {"ppo.pretraining.path": str(file), "ppo.pretraining.coef": 1.0, **values})


@pytest.mark.parametrize("rows", [TEXTS, CHATS], ids=["raw text", "conversations"])
def test_rows(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    """Nothing is held out; raw text is learnt whole, of conversations the answers; over-long ones are cut as SFT cuts them."""
    recipe = recipe_of(tmp_path, rows, **{"data.max_length": 24})
    template = build_template("chat", make_tokenizer())
    corpus = load_pretraining(recipe, tmp_path / "texts")
    found = read_threads(write_pretraining(corpus, template, recipe, tmp_path / "texts"))
    assert len(found) == 5
    learnt = {template.tokenizer.decode(row.ids[row.loss_mask]) for row in found}
    if rows is TEXTS:
        assert learnt == {f"assage {number} has some words"[:23] for number in range(5)}  # the first token is no target
    else:
        assert {text[:4] for text in learnt} == {"Answ"}


def test_texts_without_anything_to_learn(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, CHATS, **{"data.max_length": 8})  # not even the question fits
    corpus = load_pretraining(recipe, tmp_path / "texts")
    with pytest.raises(DataError, match=r"ppo\.pretraining: none of 5 texts .* has a token to learn"):
        write_pretraining(corpus, build_template("chat", make_tokenizer()), recipe, tmp_path / "texts")
