"""How well scores order ranked groups: sums that add up over groups, wherever they were taken, and the metrics made of them.

Shape legend and group_sizes: see app.numerics.preference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from app.numerics.preference import check_scores, ranked_pairs

CALIBRATION_BINS = 10


def ranking_sums(scores_N: torch.Tensor, group_sizes: Sequence[int]) -> dict[str, float]:
    """What `ranking_metrics` needs of these groups; the sums of several calls, added up key by key, are those of all their groups.

    Raises ValueError for a group of fewer than two.
    """
    check_scores(scores_N, group_sizes)
    scores_N = scores_N.double()
    better_P, worse_P, group_P, _ = ranked_pairs(group_sizes, scores_N.device)
    sizes_G = torch.tensor(group_sizes, device=scores_N.device)
    starts_G = sizes_G.cumsum(0) - sizes_G
    best_G, worst_G = scores_N[starts_G], scores_N[starts_G + sizes_G - 1]
    lead_P = scores_N[better_P] - scores_N[worse_P]
    sign_P = lead_P.sign()
    return {
        "groups": len(group_sizes),
        "pairs": len(lead_P),
        "replies": len(scores_N),
        "hits": _sum(_hits(lead_P)),
        "best_hits": _sum(_hits(best_G - worst_G)),
        "kendall": _sum(_kendall(sign_P, group_P, sizes_G)),
        "spearman": _sum(_spearman(sign_P, better_P, worse_P, sizes_G)),
        "scores": _sum(scores_N),
        "squares": _sum(scores_N.square()),
        "best_scores": _sum(best_G),
        "worst_scores": _sum(worst_G),
        "p_chosen": _sum(lead_P.sigmoid()),
        **_calibration(lead_P),
    }


def ranking_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """From the sums over at least one group:

    pair_accuracy     pairs whose better reply scores strictly higher (a tie counts half), over all pairs
    best_vs_worst     the same of each group's first and last reply alone
    kendall_tau       mean over groups of tau-b between scores and ranks; ties of scores lower it, a group of equal scores counts 0
    spearman          mean over groups of rho, ties sharing their mean rank; a group of equal scores counts 0
    score_mean, score_std                of all replies (population standard deviation)
    best_score, worst_score, score_gap   mean score of first replies, of last replies, and their difference
    mean_p_chosen     mean over pairs of sigmoid(s_i - s_j), the probability that the model gives to the choice that was made
    calibration_error expected calibration error: a pair's confidence is sigmoid(|s_i - s_j|), from 1/2 to 1; over 10 equal bins,
                      the mean distance between confidence and the share of pairs ordered as ranked, weighted by the bins' pairs

    Sources: Kendall 1945, https://doi.org/10.1093/biomet/33.3.239; Guo et al. 2017, https://arxiv.org/abs/1706.04599, equation 3.
    """
    groups, pairs, replies = sums["groups"], sums["pairs"], sums["replies"]
    mean = sums["scores"] / replies
    return {
        "pair_accuracy": sums["hits"] / pairs,
        "best_vs_worst": sums["best_hits"] / groups,
        "kendall_tau": sums["kendall"] / groups,
        "spearman": sums["spearman"] / groups,
        "score_mean": mean,
        "score_std": max(0.0, sums["squares"] / replies - mean**2) ** 0.5,
        "best_score": sums["best_scores"] / groups,
        "worst_score": sums["worst_scores"] / groups,
        "score_gap": (sums["best_scores"] - sums["worst_scores"]) / groups,
        "mean_p_chosen": sums["p_chosen"] / pairs,
        "calibration_error": sum(abs(sums[f"overconfidence_{number}"]) for number in range(CALIBRATION_BINS)) / pairs,
    }


def _hits(lead: torch.Tensor) -> torch.Tensor:
    """1 where the better reply leads, 1/2 at a tie, 0 where it trails."""
    return (lead.sign() + 1) / 2


def _kendall(sign_P: torch.Tensor, group_P: torch.Tensor, sizes_G: torch.Tensor) -> torch.Tensor:
    """(concordant - discordant) / sqrt(pairs * pairs with different scores); ranks have no ties."""
    blank_G = sign_P.new_zeros(len(sizes_G))
    concordance_G = blank_G.index_add(0, group_P, sign_P)
    different_G = blank_G.index_add(0, group_P, sign_P.abs())
    pairs_G = sizes_G * (sizes_G - 1) / 2
    return concordance_G / (pairs_G * different_G).sqrt().clamp(min=1)  # 0 / 1 for equal scores; else the root is at least 1


def _spearman(sign_P: torch.Tensor, better_P: torch.Tensor, worse_P: torch.Tensor, sizes_G: torch.Tensor) -> torch.Tensor:
    """Correlation of ranks, where a reply's rank by score is how many of its group it beats, ties counting half."""
    total = int(sizes_G.sum())
    beaten_N = sign_P.new_zeros(total).index_add(0, better_P, (1 + sign_P) / 2).index_add(0, worse_P, (1 - sign_P) / 2)
    group_N = torch.arange(len(sizes_G), device=sizes_G.device).repeat_interleave(sizes_G)
    last_N = (sizes_G.cumsum(0) - 1)[group_N]
    worse_ranked_N = last_N - torch.arange(total, device=sizes_G.device)
    middle_N = (sizes_G[group_N] - 1) / 2
    score_N, rank_N = beaten_N - middle_N, worse_ranked_N - middle_N
    blank_G = sign_P.new_zeros(len(sizes_G))
    product_G, score_square_G, rank_square_G = (
        blank_G.index_add(0, group_N, values_N) for values_N in (score_N * rank_N, score_N**2, rank_N.double() ** 2)
    )
    return product_G / (score_square_G * rank_square_G).sqrt().clamp(min=0.25)  # 0 for equal scores; else the root is at least 1/2


def _calibration(lead_P: torch.Tensor) -> dict[str, float]:
    """Per bin of confidence: the sum of confidence - hit over its pairs."""
    confidence_P = lead_P.abs().sigmoid()
    bin_P = ((2 * confidence_P - 1) * CALIBRATION_BINS).nan_to_num().long().clamp(max=CALIBRATION_BINS - 1)
    sums = lead_P.new_zeros(CALIBRATION_BINS).index_add(0, bin_P, confidence_P - _hits(lead_P))
    return {f"overconfidence_{number}": value for number, value in enumerate(sums.tolist())}


def _sum(values: torch.Tensor) -> float:
    return float(values.sum())
