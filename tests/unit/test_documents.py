"""What the pages under docs/ name exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from app.config.data import DataConfig
from app.config.keys import recipe_keys
from app.config.recipe import Recipe
from app.data.corpus import load_corpus
from app.formats import FORMATS
from jobs.main import RECIPE_COMMANDS, TOOLS

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
SECTIONS = "|".join(Recipe.model_fields)


RESULTS = ("tune.trials", "tune.best", "tune.best_config")
"""Of `summary.json`; no keys of a recipe."""


def exists(key: str) -> bool:
    """A key, a section of keys, or something in a free table."""
    return any(
        name == key or name.startswith(f"{key}.") or (of.is_table and key.startswith(f"{name}.")) for name, of in recipe_keys().items()
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_of_the_recipe(page: Path) -> None:
    keys = re.findall(rf"`((?:{SECTIONS})\.[a-z_0-9.]*[a-z_0-9])(?=`| = )", page.read_text())
    files = (".json", ".jsonl", ".log", ".md", ".toml", ".html", ".parquet")
    assert [key for key in keys if not exists(key) and not key.endswith(files) and key not in RESULTS] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands(page: Path) -> None:
    named = set(re.findall(r"`corral ([a-z]+)", page.read_text()))
    assert named <= {*RECIPE_COMMANDS, *TOOLS}


def test_an_example_row_of_every_format(tmp_path: Path) -> None:
    """Each is detected as what the table says, and gives the stages what it says."""
    table = re.findall(r"^\| `(\w+)` \| ([a-z, ]+) \| `(\{.*\})` \|$", (ROOT / "docs" / "data_sets.md").read_text(), re.MULTILINE)
    assert [name for name, _, _ in table] == list(FORMATS)
    for name, stages, row in table:
        file = tmp_path / f"{name}.jsonl"
        file.write_text(f"{row}\n")
        corpus = load_corpus(DataConfig(path=str(file)), seed=1, folder=tmp_path, split=False)
        has = {"sft": "threads", "rm": "groups", "ppo": "prompts"}
        assert (corpus.format, corpus.quarantined) == (name, 0)
        given = ", ".join(stage for stage, kind in has.items() if corpus.counts[kind])
        assert given == stages, name


def test_the_test_would_notice() -> None:
    assert exists("sft.batch_size") and exists("sft.deepspeed") and exists("data.sets.mine")
    assert not exists("sft.batchsize") and not exists("sft.deep")
