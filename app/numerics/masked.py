"""Reductions over the True entries of a mask. Masked entries may hold anything, NaN included: they never count.

Shapes: x and mask have the same shape (any), mask is bool, True = counts.
"""

from __future__ import annotations

import torch


def zero_masked(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """x where mask is True, else 0. Selects instead of multiplying, so a masked NaN neither shows nor gets gradient.

    >>> zero_masked(torch.tensor([1.0, float("nan")]), torch.tensor([True, False]))
    tensor([1., 0.])
    """
    return torch.where(mask, x, torch.zeros_like(x))


def masked_sum(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sum over mask of x; a scalar.

    >>> masked_sum(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([True, False, True]))
    tensor(5.)
    """
    return zero_masked(x, mask).sum()


def masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over mask of x; a scalar, 0 for an empty mask. For whole batches only: a loss divides by global totals instead.

    >>> masked_mean(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([True, False, True]))
    tensor(2.5000)
    """
    return masked_sum(x, mask) / mask.sum().clamp(min=1)


def masked_variance(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Population variance over mask of x (divides by the count, not the count - 1); a scalar, 0 for an empty mask.

    >>> masked_variance(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([True, False, True]))
    tensor(2.2500)
    """
    wide = x.double()  # the float32 mean of what are all the same number can be another one
    return masked_mean((wide - masked_mean(wide, mask)) ** 2, mask).to(x.dtype)


def masked_max_abs(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Largest |x| over mask; a scalar, 0 for an empty mask.

    >>> masked_max_abs(torch.tensor([1.0, -3.0, 9.0]), torch.tensor([True, True, False]))
    tensor(3.)
    """
    if x.numel() == 0:
        return x.new_zeros(())
    return zero_masked(x, mask).abs().max()


def whiten(x: torch.Tensor, mask: torch.Tensor, epsilon: float = 1e-8) -> torch.Tensor:
    """(x - mean) / sqrt(variance + epsilon) over mask, 0 elsewhere; same shape as x.

    Mean and population variance are those of all the True entries given, so pass the whole batch, before it is split.
    Source: `masked_whiten` of Huang et al. 2024 (vwxyzjn/summarize_from_feedback_details, ppo.py).

    >>> whiten(torch.tensor([[1.0, 3.0, 99.0]]), torch.tensor([[True, True, False]]))
    tensor([[-1.,  1.,  0.]])
    """
    wide = x.double()  # see masked_variance; epsilon is small enough to blow a rounding error up to an advantage
    scaled = ((wide - masked_mean(wide, mask)) * torch.rsqrt(masked_variance(wide, mask) + epsilon)).to(x.dtype)
    return zero_masked(scaled, mask)
