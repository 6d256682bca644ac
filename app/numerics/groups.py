"""Comparisons within groups of responses to one prompt.

Shape legend: B rows. groups_B: int64, rows with equal numbers belong together, wherever they stand; valid_B: bool, False on rows
that count nowhere (their x may be NaN) and get 0. A row that is alone in its group has nothing to be compared with and gets 0.
"""

from __future__ import annotations

import torch

from app.numerics.masked import zero_masked


def group_means(x_B: torch.Tensor, groups_B: torch.Tensor, valid_B: torch.Tensor) -> torch.Tensor:
    """Mean over the valid rows of each row's group, [B]; 0 on invalid rows.

    >>> group_means(torch.tensor([1.0, 3.0, 7.0]), torch.tensor([5, 5, 8]), torch.tensor([True, True, True]))
    tensor([2., 2., 7.])
    """
    wide_B = x_B.double()  # rounding errors of a float32 sum would tell apart from their mean what are all the same number
    together_BB = _together(wide_B, groups_B, valid_B)
    return ((together_BB @ zero_masked(wide_B, valid_B)) / together_BB.sum(1).clamp(min=1)).to(x_B.dtype)


def centred(x_B: torch.Tensor, groups_B: torch.Tensor, valid_B: torch.Tensor) -> torch.Tensor:
    """x minus the mean of its group, [B].

    >>> centred(torch.tensor([1.0, 3.0, 7.0]), torch.tensor([0, 0, 1]), torch.tensor([True, True, True]))
    tensor([-1.,  1.,  0.])
    """
    return zero_masked(x_B - group_means(x_B, groups_B, valid_B), valid_B)


def leave_one_out(x_B: torch.Tensor, groups_B: torch.Tensor, valid_B: torch.Tensor) -> torch.Tensor:
    """x minus the mean of the *other* valid rows of its group, [B].

    Source: RLOO, Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740, section 2.3.

    >>> leave_one_out(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 0]), torch.tensor([True, True, True]))
    tensor([-3.,  0.,  3.])
    """
    count_B = _together(x_B, groups_B, valid_B).sum(1)
    # x - (sum - x) / (n - 1) = (x - mean) * n / (n - 1)
    return centred(x_B, groups_B, valid_B) * count_B / (count_B - 1).clamp(min=1)


def standardised(x_B: torch.Tensor, groups_B: torch.Tensor, valid_B: torch.Tensor, epsilon: float = 1e-4) -> torch.Tensor:
    """(x - mean) / (standard deviation + epsilon) within each group, [B]; the deviation divides by count - 1.

    Source: GRPO, Shao et al. 2024, https://arxiv.org/abs/2402.03300, section 4.1.2.

    >>> standardised(torch.tensor([1.0, 3.0]), torch.tensor([0, 0]), torch.tensor([True, True]), epsilon=0.0)
    tensor([-0.7071,  0.7071])
    """
    together_BB = _together(x_B, groups_B, valid_B)
    centred_B = centred(x_B, groups_B, valid_B)
    variance_B = (together_BB @ centred_B**2) / (together_BB.sum(1) - 1).clamp(min=1)
    return centred_B / (variance_B.sqrt() + epsilon)


def _together(x_B: torch.Tensor, groups_B: torch.Tensor, valid_B: torch.Tensor) -> torch.Tensor:
    """1 where two valid rows are of one group, else 0; [B, B]."""
    same_BB = (groups_B[:, None] == groups_B[None, :]) & valid_B[:, None] & valid_B[None, :]
    return same_BB.to(x_B.dtype)
