"""Several data sets: how many rows of each an epoch takes, what is held out, and that nothing depends on where a run stands."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.config.data import DataConfig, SetConfig
from app.config.loading import load_recipe, to_toml
from app.data.corpus import Corpus, load_corpus
from app.data.mixture import Mixture
from app.data.registry import complete
from app.errors import ConfigError, DataError

SOURCES = {"big": SetConfig(fraction=0.25), "small": SetConfig(), "capped": SetConfig(size=3)}
DATASETS = ["big"] * 20 + ["small"] * 4 + ["capped"] * 9


def test_each_epoch_takes_its_share_of_every_set_anew() -> None:
    mixture = Mixture.of(DATASETS, SOURCES)
    assert mixture.rows_per_epoch == 5 + 4 + 3
    seen: set[int] = set()
    for epoch in range(40):
        rows = mixture.rows(12 * epoch, 12, seed=7)
        assert len(set(rows)) == 12, "drawn without replacement"
        assert Counter(DATASETS[row] for row in rows) == {"big": 5, "small": 4, "capped": 3}
        seen |= set(rows)
    assert seen == set(range(33)), "over epochs every row has its turn"
    assert mixture.rows(0, 12, seed=7) != mixture.rows(12, 12, seed=7) != mixture.rows(12, 12, seed=8)


@settings(deadline=None)
@given(cut=st.integers(0, 60), count=st.integers(1, 40), seed=st.integers(0, 3))
def test_the_stream_goes_on_from_anywhere(cut: int, count: int, seed: int) -> None:
    mixture = Mixture.of(DATASETS, SOURCES)
    assert mixture.rows(cut, count, seed=seed) == mixture.rows(0, cut + count, seed=seed)[cut:]


def test_a_tiny_fraction_takes_at_least_one_row() -> None:
    assert Mixture.of(["a"] * 3, {"a": SetConfig(fraction=0.01)}).rows_per_epoch == 1
    assert Mixture.of(["a"] * 3, {"a": SetConfig(size=10)}).rows_per_epoch == 3


# --- reading -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    chats = [{"messages": [{"role": "user", "content": f"Q{k}?"}, {"role": "assistant", "content": f"A{k}"}]} for k in range(20)]
    pairs = [{"frage": f"Q{k}?", "gut": "yes", "schlecht": "no"} for k in range(10, 30)]
    out = {name: tmp_path / f"{name}.jsonl" for name in ("chats", "pairs")}
    for name, rows in (("chats", chats), ("pairs", [*pairs, {"frage": ""}])):
        out[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return out


def sets(files: dict[str, Path], **chats: Any) -> DataConfig:
    columns = {"prompt": "frage", "chosen": "gut", "rejected": "schlecht"}
    return DataConfig.model_validate(
        {
            "val_split": 0.2,
            "sets": {"chats": {"path": str(files["chats"]), **chats}, "pairs": {"path": str(files["pairs"]), "columns": columns}},
        }
    )


def openings(corpus: Corpus, side: str) -> set[str]:
    return {messages[0].content for messages in getattr(corpus, side).conversations()}


def test_sets_are_read_side_by_side(files: dict[str, Path], tmp_path: Path) -> None:
    corpus = load_corpus(sets(files), seed=1, folder=tmp_path / "run")
    assert {name: (source.format, source.rows, source.quarantined) for name, source in corpus.sources.items()} == {
        "chats": ("messages", 20, 0),
        "pairs": ("preference", 21, 1),
    }
    assert corpus.counts == {"trees": 40, "messages": 100, "threads": 40, "groups": 20, "pairs": 20, "prompts": 40}
    assert (corpus.rows, corpus.quarantined, corpus.format) == (41, 1, "messages, preference")
    names = [thread.dataset for thread in corpus.train.threads]
    assert names == sorted(names), "rows of one set stand together"
    assert {group.dataset for group in corpus.train.groups} == {"pairs"}
    assert set(corpus.facts()["sets"]) == {"chats", "pairs"}


def test_a_conversation_held_out_of_one_set_is_held_out_of_all(files: dict[str, Path], tmp_path: Path) -> None:
    for seed in range(5):
        corpus = load_corpus(sets(files), seed=seed, folder=tmp_path / str(seed))
        assert not openings(corpus, "train") & openings(corpus, "validation")
        assert len(openings(corpus, "train") | openings(corpus, "validation")) == 30


def test_own_split_and_a_limit_on_what_is_held_out(files: dict[str, Path], tmp_path: Path) -> None:
    wide = load_corpus(sets(files, val_split=0.5), seed=1, folder=tmp_path / "a")
    capped = load_corpus(sets(files, val_split=0.5, max_val_set=3), seed=1, folder=tmp_path / "b")

    def held_out(corpus: Corpus) -> list[str]:
        return [thread.id for thread in corpus.validation.threads if thread.dataset == "chats"]

    assert len(held_out(wide)) >= 10
    assert len(held_out(capped)) == 3
    assert set(held_out(capped)) < set(held_out(wide))
    assert capped.train == wide.train, "what is not kept for validation is not trained on either"


def test_the_hash_tells_which_sets_were_read(files: dict[str, Path], tmp_path: Path) -> None:
    both = load_corpus(sets(files), seed=1, folder=tmp_path / "both")
    alone = load_corpus(DataConfig(path=str(files["chats"])), seed=1, folder=tmp_path / "alone")
    assert both.sources["chats"].sha256 == alone.sha256 != both.sha256


# --- configuration -------------------------------------------------------------------------------------------------------


def test_sets_in_a_recipe_and_on_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text('[data.sets.chats]\npath = "chats.jsonl"\nfraction = 0.5\n[data.sets.webgpt]\n')
    recipe = load_recipe(file, ["--data.sets.chats.fraction=0.1", "--data.sets.more.path=more.jsonl", "--data.val_split=0.1"])
    assert {name: (source.path, source.fraction, source.val_split) for name, source in recipe.data.sources().items()} == {
        "chats": ("chats.jsonl", 0.1, 0.1),
        "webgpt": (None, None, 0.1),
        "more": ("more.jsonl", None, 0.1),
    }
    again = tmp_path / "again.toml"
    again.write_text(to_toml(recipe))
    assert load_recipe(again) == recipe


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["--data.path=x.jsonl", "--data.sets.a.path=y.jsonl"], "data.sets and data.path exclude each other"),
        (["--data.sets.a.fraction=0.5", "--data.sets.a.size=5"], "fraction and size exclude each other"),
        (["--data.sets.a.fraction=1.5"], "less than or equal to 1"),
        (["--data.sets.a.fractoin=0.5"], r"unknown key data\.sets\.a\.fractoin: did you mean fraction\?"),
    ],
)
def test_contradictions(overrides: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        load_recipe(None, overrides)


def test_public_sets_are_filled_in_from_the_table() -> None:
    config = DataConfig.model_validate({"phrases": ["never"], "sets": {"gsm8k": {"fraction": 0.5}, "alpaca": {"phrases": ["no"]}}})
    sources = complete(config).sources()
    assert (sources["gsm8k"].path, sources["gsm8k"].subset, sources["gsm8k"].fraction) == ("openai/gsm8k", "main", 0.5)
    assert (sources["gsm8k"].columns.prompt, sources["gsm8k"].stages, sources["gsm8k"].phrases) == ("question", ("sft",), ("never",))
    assert sources["alpaca"].phrases == ("no",), "what the recipe says wins"


def test_a_set_serves_only_its_stages(files: dict[str, Path], tmp_path: Path) -> None:
    corpus = load_corpus(sets(files, stages=["ppo"]), seed=1, folder=tmp_path)
    assert {thread.dataset for thread in corpus.train.threads} == {"pairs"}
    assert {prompt.dataset for prompt in corpus.train.prompts} == {"chats", "pairs"}


def test_a_set_without_a_path(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no public data set is called 'nowhere'.*data\.sets\.nowhere\.path"):
        load_corpus(DataConfig(sets={"nowhere": SetConfig()}), seed=1, folder=tmp_path)
