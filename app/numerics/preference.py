"""Bradley-Terry loss over ranked groups of replies.

Shape legend: N scores, those of one group after another, best reply first within each group; G groups; P pairs.
group_sizes holds each group's number of replies (G integers, at least 2 each, N in all).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class RankedPairs(NamedTuple):
    """Every pair i < j of every group: better_P and worse_P index into N (int64); group_weights_P = 1 / pairs in its group."""

    better_P: torch.Tensor
    worse_P: torch.Tensor
    group_weights_P: torch.Tensor


def ranked_pairs(group_sizes: Sequence[int], device: torch.device | None = None) -> RankedPairs:
    """All pairs of all groups, group by group.

    >>> ranked_pairs([3, 2])
    RankedPairs(better_P=tensor([0, 0, 1, 3]), worse_P=tensor([1, 2, 2, 4]), group_weights_P=tensor([0.3333, 0.3333, 0.3333, 1.0000]))
    """
    pairs, weights, start = [], [], 0
    for size in group_sizes:
        within = torch.triu_indices(size, size, offset=1)
        pairs.append(within + start)
        weights.append(torch.full((within.shape[1],), 1.0 / within.shape[1]))
        start += size
    better_P, worse_P = torch.cat(pairs, dim=1).to(device)
    return RankedPairs(better_P, worse_P, torch.cat(weights).to(device))


def group_bradley_terry_loss(scores_N: torch.Tensor, group_sizes: Sequence[int], *, score_l2: float, num_groups: int) -> torch.Tensor:
    """Scalar: sum over groups of mean over the group's pairs i < j of

        -log sigmoid(s_i - s_j) + score_l2 * 0.5 * (s_i^2 + s_j^2)

    divided by num_groups, the groups of the whole optimizer step over all micro-batches and ranks (a sum of parts is then
    the mean over groups, each group weighing the same whatever its size). Raises ValueError for a group of fewer than two.
    Source: Bradley and Terry 1952; Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, equation 1.

    >>> group_bradley_terry_loss(torch.tensor([1.0, 0.0]), [2], score_l2=0.0, num_groups=1)  # log(1 + exp(-1))
    tensor(0.3133)
    """
    _check_groups(scores_N, group_sizes)
    better_P, worse_P, weights_P = ranked_pairs(group_sizes, scores_N.device)
    high_P, low_P = scores_N[better_P], scores_N[worse_P]
    losses_P = -torch.nn.functional.logsigmoid(high_P - low_P) + score_l2 * 0.5 * (high_P**2 + low_P**2)
    return (weights_P * losses_P).sum() / num_groups


def pair_hits(scores_N: torch.Tensor, group_sizes: Sequence[int]) -> tuple[float, int]:
    """How many pairs score the better reply strictly higher (a tie counts half), and how many pairs there are.

    Pair accuracy is the first over the second, each added up over batches.

    >>> pair_hits(torch.tensor([2.0, 1.0, 1.0]), [3])  # 2 > 1, 2 > 1, 1 = 1
    (2.5, 3)
    """
    _check_groups(scores_N, group_sizes)
    better_P, worse_P, _ = ranked_pairs(group_sizes, scores_N.device)
    return _hits(scores_N[better_P], scores_N[worse_P]), len(better_P)


def best_worst_hits(scores_N: torch.Tensor, group_sizes: Sequence[int]) -> tuple[float, int]:
    """How many groups score their best reply strictly above their worst (a tie counts half), and how many groups there are.

    >>> best_worst_hits(torch.tensor([2.0, 3.0, 1.0, 0.0, 0.0]), [3, 2])
    (1.5, 2)
    """
    _check_groups(scores_N, group_sizes)
    ends_G = torch.tensor(group_sizes, device=scores_N.device).cumsum(0)
    starts_G = torch.cat([ends_G.new_zeros(1), ends_G[:-1]])
    return _hits(scores_N[starts_G], scores_N[ends_G - 1]), len(group_sizes)


def _check_groups(scores_N: torch.Tensor, group_sizes: Sequence[int]) -> None:
    if not group_sizes or min(group_sizes) < 2:
        raise ValueError(f"a ranked group needs at least two replies, got group sizes {list(group_sizes)}")
    if scores_N.shape != (sum(group_sizes),):
        raise ValueError(f"scores of shape {tuple(scores_N.shape)} do not fit groups of {sum(group_sizes)} replies in all")


def _hits(high: torch.Tensor, low: torch.Tensor) -> float:
    return float((high > low).sum()) + 0.5 * float((high == low).sum())
