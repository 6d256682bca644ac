"""Bradley-Terry losses over ranked groups of replies.

Shape legend: N scores, those of one group after another, best reply first within each group; G groups; P pairs.
group_sizes holds each group's number of replies (G integers, at least 2 each, N in all).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class RankedPairs(NamedTuple):
    """Every pair i < j of every group: better_P, worse_P index into N, group_P into G (int64); group_weights_P = 1 / the group's pairs."""

    better_P: torch.Tensor
    worse_P: torch.Tensor
    group_P: torch.Tensor
    group_weights_P: torch.Tensor


def ranked_pairs(group_sizes: Sequence[int], device: torch.device | None = None) -> RankedPairs:
    """All pairs of all groups, group by group. Raises ValueError where there is no group, or one of fewer than two.

    >>> pairs = ranked_pairs([3, 2])
    >>> pairs.better_P, pairs.worse_P
    (tensor([0, 0, 1, 3]), tensor([1, 2, 2, 4]))
    >>> pairs.group_P, pairs.group_weights_P
    (tensor([0, 0, 0, 1]), tensor([0.3333, 0.3333, 0.3333, 1.0000]))
    """
    if not group_sizes or min(group_sizes) < 2:
        raise ValueError(f"a ranked group needs at least two replies, got group sizes {list(group_sizes)}")
    pairs, start = [], 0
    for size in group_sizes:
        pairs.append(torch.triu_indices(size, size, offset=1) + start)
        start += size
    better_P, worse_P = torch.cat(pairs, dim=1).to(device)
    pairs_G = torch.tensor([within.shape[1] for within in pairs], device=device)
    group_P = torch.arange(len(pairs), device=device).repeat_interleave(pairs_G)
    return RankedPairs(better_P, worse_P, group_P, (1.0 / pairs_G)[group_P])


def group_bradley_terry_loss(
    scores_N: torch.Tensor, group_sizes: Sequence[int], *, score_l2: float, num_groups: int, margin: float = 0.0
) -> torch.Tensor:
    """Scalar: sum over groups of mean over the group's pairs i < j of

        -log sigmoid(s_i - s_j - margin * (j - i)) + score_l2 * 0.5 * (s_i^2 + s_j^2)

    divided by num_groups, the groups of the whole optimizer step over all micro-batches and ranks (a sum of parts is then
    the mean over groups, each group weighing the same whatever its size). j - i is the distance in rank, so that scores one
    margin apart from rank to rank keep every pair's margin at once. Raises ValueError for a group of fewer than two.
    Source: Bradley and Terry 1952; Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, equation 1; the margin is that of
    Touvron et al. 2023, https://arxiv.org/abs/2307.09288, equation 2.

    >>> group_bradley_terry_loss(torch.tensor([1.0, 0.0]), [2], score_l2=0.0, num_groups=1)  # log(1 + exp(-1))
    tensor(0.3133)
    """
    check_scores(scores_N, group_sizes)
    pairs = ranked_pairs(group_sizes, scores_N.device)
    return (pairs.group_weights_P * _pair_losses(scores_N, pairs, score_l2, margin)).sum() / num_groups


def pair_bradley_terry_loss(
    scores_N: torch.Tensor, group_sizes: Sequence[int], *, score_l2: float, num_pairs: int, margin: float = 0.0
) -> torch.Tensor:
    """Scalar: the same term of every pair, summed, and divided by num_pairs, the pairs of the whole optimizer step: every pair
    weighs the same, so that a group counts by its number of pairs. Raises ValueError for a group of fewer than two.

    Without score_l2 and margin it is the two-way cross-entropy over the scores of each pair.

    >>> pair_bradley_terry_loss(torch.tensor([1.0, 0.0]), [2], score_l2=0.0, num_pairs=1)
    tensor(0.3133)
    """
    check_scores(scores_N, group_sizes)
    return _pair_losses(scores_N, ranked_pairs(group_sizes, scores_N.device), score_l2, margin).sum() / num_pairs


def _pair_losses(scores_N: torch.Tensor, pairs: RankedPairs, score_l2: float, margin: float) -> torch.Tensor:
    high_P, low_P = scores_N[pairs.better_P], scores_N[pairs.worse_P]
    lead_P = high_P - low_P - margin * (pairs.worse_P - pairs.better_P)
    return -torch.nn.functional.logsigmoid(lead_P) + score_l2 * 0.5 * (high_P**2 + low_P**2)


def check_scores(scores_N: torch.Tensor, group_sizes: Sequence[int]) -> None:
    """Raises ValueError unless there is one score per reply."""
    if scores_N.shape != (sum(group_sizes),):
        raise ValueError(f"scores of shape {tuple(scores_N.shape)} do not fit groups of {sum(group_sizes)} replies in all")
