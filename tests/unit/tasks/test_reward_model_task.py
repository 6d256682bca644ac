"""The reward model's task: what weighs the same under each loss, whatever the micro-batches, and the metrics that it reports."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

from app.config.training import RewardModelConfig
from app.data.token_cache import GroupRow
from app.tasks.reward_model import RewardModelTask

CPU = torch.device("cpu")
LAYOUTS = [[[0, 1, 2, 3]], [[0], [1], [2], [3]], [[2, 0], [3, 1]]]


def rows() -> list[GroupRow]:
    draw = np.random.default_rng(5)
    sizes = (2, 5, 3, 4)
    return [GroupRow(f"g{n}", tuple(draw.integers(4, 90, 6).astype(np.int32) for _ in range(size))) for n, size in enumerate(sizes)]


def mean_id(ids_NS: torch.Tensor, attention_NS: torch.Tensor) -> torch.Tensor:
    """Stands in for an engine: a score that depends on each reply alone."""
    return (ids_NS * attention_NS).sum(1) / attention_NS.sum(1) / 20


def score(ids: np.ndarray) -> float:
    return float(ids.mean()) / 20


def task(**settings: object) -> RewardModelTask:
    return RewardModelTask(Path("data"), "sft", 0, False, RewardModelConfig.model_validate(settings))


def step_loss(task: RewardModelTask, layout: list[list[int]]) -> float:
    """As the training loop adds it up over the micro-batches of an optimizer step."""
    all_rows = rows()
    total = sum(float(task.loss(mean_id, [all_rows[i] for i in batch], CPU)) for batch in layout)
    return total / sum(task.weight(row) for row in all_rows)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pairs_is_the_mean_over_all_pairs_of_the_step(layout: list[list[int]]) -> None:
    pairs = [pair for row in rows() for pair in combinations([score(ids) for ids in row.sequences], 2)]
    plain = torch.tensor([-np.log(1 / (1 + np.exp(worse - better))) for better, worse in pairs])
    assert step_loss(task(loss="pairs", score_l2=0.0), layout) == pytest.approx(float(plain.mean()), abs=1e-5)
    with_l2 = plain + torch.tensor([0.01 * 0.5 * (better**2 + worse**2) for better, worse in pairs])
    assert step_loss(task(loss="pairs", score_l2=0.01), layout) == pytest.approx(float(with_l2.mean()), abs=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["group", "pairs"])
def test_held_out_loss_is_the_loss_that_is_trained(kind: str, layout: list[list[int]]) -> None:
    chosen = task(loss=kind, margin=0.3)
    sums: Counter[str] = Counter()
    for batch in layout:
        sums.update(chosen.evaluate(mean_id, [rows()[i] for i in batch], CPU))
    metrics = chosen.summarise(sums)
    assert metrics["loss"] == pytest.approx(step_loss(chosen, LAYOUTS[0]), abs=1e-5)
    assert metrics["loss"] != pytest.approx(step_loss(task(loss=kind), LAYOUTS[0]), abs=1e-3)
    assert set(metrics) == {
        "loss", "pair_accuracy", "best_vs_worst", "kendall_tau", "spearman", "score_mean", "score_std", "best_score", "worst_score",
        "score_gap", "calibration_error", "mean_p_chosen",
    }  # fmt: skip
    hits = [better > worse for row in rows() for better, worse in combinations([score(ids) for ids in row.sequences], 2)]
    assert metrics["pair_accuracy"] == pytest.approx(sum(hits) / len(hits))


def test_the_two_losses_differ_where_groups_differ_in_size() -> None:
    assert step_loss(task(loss="group"), LAYOUTS[0]) != pytest.approx(step_loss(task(loss="pairs"), LAYOUTS[0]), abs=1e-3)
