"""Ranking metrics against literal versions over lists of floats and tables worked out by hand."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from itertools import combinations

import pytest
import torch

from app.numerics import ranking_metrics, ranking_sums

BINS = 10


def metrics(groups: Sequence[Sequence[float]]) -> dict[str, float]:
    flat_N = torch.tensor([score for group in groups for score in group], dtype=torch.float32)
    return ranking_metrics(ranking_sums(flat_N, [len(group) for group in groups]))


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def literal_hit(better: float, worse: float) -> float:
    return 1.0 if better > worse else 0.5 if better == worse else 0.0


def literal_tau_b(group: Sequence[float]) -> float:
    """Kendall 1945 over two lists; `ranks` falls as the replies get worse."""
    ranks = [-float(i) for i in range(len(group))]
    concordance = different_scores = different_ranks = 0.0
    for i, j in combinations(range(len(group)), 2):
        a, b = group[i] - group[j], ranks[i] - ranks[j]
        concordance += math.copysign(1, a * b) if a * b else 0.0
        different_scores += a != 0
        different_ranks += b != 0
    return concordance / math.sqrt(different_scores * different_ranks) if different_scores else 0.0


def literal_rho(group: Sequence[float]) -> float:
    """Pearson correlation of the positions in sorted order, those of equal scores averaged."""
    order = sorted(group)
    by_score = [mean([i for i, value in enumerate(order) if value == score]) for score in group]
    by_rank = [float(len(group) - i) for i in range(len(group))]
    a = [x - mean(by_score) for x in by_score]
    b = [x - mean(by_rank) for x in by_rank]
    scale = math.sqrt(sum(x * x for x in a) * sum(x * x for x in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / scale if scale else 0.0


def literal_calibration(groups: Sequence[Sequence[float]]) -> float:
    bins: list[list[tuple[float, float]]] = [[] for _ in range(BINS)]
    pairs = [pair for group in groups for pair in combinations(group, 2)]
    for better, worse in pairs:
        confidence = 1 / (1 + math.exp(-abs(better - worse)))
        bins[min(BINS - 1, int((confidence - 0.5) / 0.5 * BINS))].append((confidence, literal_hit(better, worse)))
    distances = [abs(mean([c for c, _ in part]) - mean([hit for _, hit in part])) * len(part) for part in bins if part]
    return sum(distances) / len(pairs)


def literal_metrics(groups: Sequence[Sequence[float]]) -> Iterator[tuple[str, float]]:
    pairs = [pair for group in groups for pair in combinations(group, 2)]
    scores = [score for group in groups for score in group]
    yield "pair_accuracy", mean([literal_hit(*pair) for pair in pairs])
    yield "best_vs_worst", mean([literal_hit(group[0], group[-1]) for group in groups])
    yield "kendall_tau", mean([literal_tau_b(group) for group in groups])
    yield "spearman", mean([literal_rho(group) for group in groups])
    yield "score_mean", mean(scores)
    yield "score_std", math.sqrt(mean([(score - mean(scores)) ** 2 for score in scores]))
    yield "best_score", mean([group[0] for group in groups])
    yield "worst_score", mean([group[-1] for group in groups])
    yield "score_gap", mean([group[0] - group[-1] for group in groups])
    yield "mean_p_chosen", mean([1 / (1 + math.exp(worse - better)) for better, worse in pairs])
    yield "calibration_error", literal_calibration(groups)


@pytest.mark.parametrize("levels", [2, 4, 1000])
def test_literal(levels: int) -> None:
    """Few levels make many ties; some groups of equal scores are always among them."""
    draw = random.Random(levels)
    groups = [[draw.randrange(levels) / levels * 4 for _ in range(draw.randrange(2, 7))] for _ in range(40)]
    groups += [[1.0, 1.0], [0.5, 0.5, 0.5]]
    assert metrics(groups) == pytest.approx(dict(literal_metrics(groups)), abs=1e-5)


def test_table_of_correlations() -> None:
    # 3, 1, 2: pairs (3,1), (3,2) concordant, (1,2) not: tau = 1/3. Ranks 3, 1, 2 against 3, 2, 1: rho = 1 - 6 * 2 / (3 * 8) = 1/2.
    assert metrics([[3.0, 1.0, 2.0]]) == pytest.approx(metrics([[3.0, 1.0, 2.0]]) | {"kendall_tau": 1 / 3, "spearman": 0.5})
    # 2, 1, 1: two concordant, one tie: tau-b = 2 / sqrt(3 * 2). Mean ranks 3, 1.5, 1.5 against 3, 2, 1, centred 1, -.5, -.5 and
    # 1, 0, -1: rho = 1.5 / sqrt(1.5 * 2).
    tied = metrics([[2.0, 1.0, 1.0]])
    assert tied["kendall_tau"] == pytest.approx(2 / math.sqrt(6))
    assert tied["spearman"] == pytest.approx(1.5 / math.sqrt(3))
    # Averaged with a group of equal scores, which counts 0.
    both = metrics([[2.0, 1.0, 1.0], [7.0, 7.0]])
    assert both["kendall_tau"] == pytest.approx(1 / math.sqrt(6))
    assert both["spearman"] == pytest.approx(0.75 / math.sqrt(3))


def test_table_of_calibration() -> None:
    # Log-odds of 3/4: confidence 0.75 in every pair, bin 5. Three of four pairs ordered as ranked: calibrated.
    lead = math.log(3)
    calibrated = metrics([[lead, 0.0]] * 3 + [[0.0, lead]])
    assert calibrated["calibration_error"] == pytest.approx(0.0, abs=1e-6)
    assert calibrated["mean_p_chosen"] == pytest.approx((3 * 0.75 + 0.25) / 4)
    # All of them right: too modest by 1/4. A second bin, 0.9, half of it right: over-confident by 0.4. Four pairs and two: mean.
    modest = [[lead, 0.0]] * 4
    rash = [[math.log(9), 0.0], [0.0, math.log(9)]]
    assert metrics(modest)["calibration_error"] == pytest.approx(0.25)
    assert metrics(modest + rash)["calibration_error"] == pytest.approx((4 * 0.25 + 2 * 0.4) / 6)
