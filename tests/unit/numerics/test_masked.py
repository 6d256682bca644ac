"""Masked reductions: only True entries count, and whitening is over them alone."""

from __future__ import annotations

import math

import pytest
import torch

from app.numerics import masked_max_abs, masked_mean, masked_sum, masked_variance, whiten, zero_masked

MASK = torch.tensor([[True, True, False], [True, False, False]])
X = torch.tensor([[1.0, -4.0, math.nan], [6.0, math.inf, math.nan]])  # counted: 1, -4, 6


def test_reductions_ignore_what_is_masked() -> None:
    assert masked_sum(X, MASK).item() == 3.0
    assert masked_mean(X, MASK).item() == 1.0
    assert masked_variance(X, MASK).item() == pytest.approx(50 / 3)  # (0 + 25 + 25) / 3
    assert masked_max_abs(X, MASK).item() == 6.0


def test_empty_mask_gives_zero() -> None:
    nothing = torch.zeros_like(MASK)
    for reduce in (masked_sum, masked_mean, masked_variance, masked_max_abs):
        assert reduce(X, nothing).item() == 0.0
    assert whiten(X, nothing).eq(0).all()
    assert masked_max_abs(torch.zeros(3, 0), torch.zeros(3, 0, dtype=torch.bool)).item() == 0.0


def test_masked_nan_gets_no_gradient() -> None:
    x = X.clone().requires_grad_()
    (zero_masked(x, MASK) ** 2).sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([[2.0, -8.0, 0.0], [12.0, 0.0, 0.0]]))


def test_whitened_entries_have_mean_0_and_variance_1() -> None:
    torch.manual_seed(0)
    x, mask = 5 + 3 * torch.randn(8, 11), torch.rand(8, 11) < 0.6
    white = whiten(x, mask)
    assert white[mask].mean().item() == pytest.approx(0, abs=1e-6)
    assert white[mask].var(unbiased=False).item() == pytest.approx(1, abs=1e-5)
    assert white[~mask].eq(0).all()


def test_whitening_does_not_see_padding() -> None:
    torch.manual_seed(1)
    x, mask = torch.randn(4, 5), torch.rand(4, 5) < 0.7
    wide = torch.cat([x, torch.full((4, 3), 77.0)], dim=1)
    wide_mask = torch.cat([mask, torch.zeros(4, 3, dtype=torch.bool)], dim=1)
    torch.testing.assert_close(whiten(wide, wide_mask)[:, :5], whiten(x, mask))


@pytest.mark.parametrize("number", [0.1, 10.3, 1000.1, -12345.6])
def test_equal_entries_vary_by_nothing_and_whiten_to_zero(number: float) -> None:
    """A float32 sum of them divided by their count is another number; over its tiny distance that would be most of a deviation."""
    x, mask = torch.full((64, 200), number), torch.ones(64, 200, dtype=torch.bool)
    assert masked_variance(x, mask).item() == 0.0
    assert whiten(x, mask).eq(0).all() and whiten(x, mask).dtype == masked_variance(x, mask).dtype == torch.float32


def test_one_entry_whitens_to_zero() -> None:
    assert whiten(torch.tensor([[3.0]]), torch.tensor([[True]])).item() == 0.0
