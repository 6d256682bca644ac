"""A real tiny reward model in this process: scores of replies, and exact metrics of ranked groups."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from app.config.data import DataConfig
from app.config.loading import load_recipe
from app.config.recipe import Recipe
from app.data.encoding import Cuts, encode_groups
from app.data.templates import build_template
from app.data.token_cache import GroupRow
from app.errors import ConfigError, ModelError
from app.evaluation.local_scorer import LocalScorer
from app.evaluation.ranked_set import group_batches, group_metrics
from app.formats.records import Message, RankedGroup
from app.models.forward import pad_sequences
from app.models.heads import load_reward_model, sequence_scores
from app.models.load import load_tokenizer
from app.tasks.reward_model import RewardModelTask, SequenceScores
from tests.tiny_models import CONTEXT, make_neox, make_reward_model

OFFSET = 0.25


@pytest.fixture(scope="module")
def causal_lm(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_neox(tmp_path_factory.mktemp("models") / "lm")


@pytest.fixture(scope="module")
def reward(causal_lm: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_reward_model(tmp_path_factory.mktemp("models") / "rm", causal_lm, reward_offset=OFFSET)


@pytest.fixture(scope="module")
def groups() -> list[RankedGroup]:
    """Groups of two to five replies of very different lengths."""
    return [
        RankedGroup(
            f"g{k}", f"g{k}", (Message("user", "why " * (1 + k % 5)),), tuple(f"{k} {'so ' * (r * k % 7)}{r}" for r in range(2 + k % 4))
        )
        for k in range(17)
    ]


def recipe(**values: object) -> Recipe:
    return load_recipe(None, [f"--data.max_length={CONTEXT}", *(f"--{name.replace('__', '.')}={value}" for name, value in values.items())])


def literal_scores(reward: str, rows: list[GroupRow]) -> list[list[float]]:
    """Sequence by sequence, without padding."""
    model = load_reward_model(reward)
    with torch.no_grad():
        return [[float(sequence_scores(model, *pad_sequences([ids]))) for ids in row.sequences] for row in rows]


def test_scores_are_those_of_the_model_whatever_the_batch(reward: str, groups: list[RankedGroup]) -> None:
    replies = [(group.prefix, group.replies) for group in groups]
    rows = list(encode_groups(groups, build_template("auto", load_tokenizer(reward)), DataConfig(max_length=CONTEXT), 0, Cuts()))
    expected = [[score - OFFSET for score in row] for row in literal_scores(reward, rows)]
    for tokens in (1, 300, 8192):
        given = LocalScorer(reward, recipe(scoring__max_batch_tokens=tokens)).score(replies)
        for got, want in zip(given, expected, strict=True):
            np.testing.assert_allclose(got, want, atol=1e-5)


def test_metrics_are_means_over_groups_whatever_the_batch(reward: str, groups: list[RankedGroup]) -> None:
    rows = list(encode_groups(groups, build_template("auto", load_tokenizer(reward)), DataConfig(max_length=CONTEXT), 0, Cuts()))
    scores = literal_scores(reward, rows)
    task = RewardModelTask(Path(), reward, 0, False)
    model = SequenceScores(load_reward_model(reward), sharing=False)
    pairs = [a > b for row in scores for i, a in enumerate(row) for b in row[i + 1 :]]
    one_by_one = [group_metrics(model, task, [row], max_tokens=1, advance=lambda count: None)["loss"] for row in rows]
    for tokens in (1, 700, 100_000):
        metrics = group_metrics(model, task, rows, max_tokens=tokens, advance=lambda count: None)
        assert metrics["pair_accuracy"] == pytest.approx(np.mean(pairs))
        assert metrics["best_vs_worst"] == pytest.approx(np.mean([row[0] > row[-1] for row in scores]))
        assert metrics["loss"] == pytest.approx(np.mean(one_by_one), abs=1e-5)


def test_batches_hold_every_group_once_within_the_budget() -> None:
    rng = np.random.default_rng(0)
    rows = [GroupRow(str(k), tuple(np.zeros(n, np.int32) for n in rng.integers(1, 50, size=2 + k % 4))) for k in range(60)]
    batches = group_batches(rows, 400)
    assert sorted(index for batch in batches for index in batch) == list(range(60))
    sizes = [sum(len(rows[i].sequences) for i in batch) * max(len(ids) for i in batch for ids in rows[i].sequences) for batch in batches]
    assert max(sizes) <= 400
    assert sum(sizes) / 400 > 0.7 * len(batches), "they are well filled"
    assert all(len(batch) == 1 for batch in group_batches(rows, 1))


def test_what_is_no_reward_model(causal_lm: str, reward: str) -> None:
    with pytest.raises(ModelError, match="one label, this one has 2"):
        LocalScorer(causal_lm, recipe())
    with pytest.raises(ConfigError, match=f"data.max_length = 512 tokens, and the model's context is {CONTEXT}"):
        LocalScorer(reward, load_recipe(None))
