"""GAE: its limits in lambda, and that padding and masked values cannot reach it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from app.numerics import generalized_advantages


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths_B = torch.randint(1, 8, (5,), generator=generator)
    mask_BT = torch.arange(7) < lengths_B[:, None]
    return torch.randn(5, 7, generator=generator), torch.randn(5, 7, generator=generator), mask_BT


@pytest.mark.parametrize("gamma", [0.9, 1.0])
def test_lambda_1_is_discounted_return_minus_value(gamma: float) -> None:
    rewards_BT, values_BT, mask_BT = batch(0)
    actual = generalized_advantages(rewards_BT, values_BT, mask_BT, gamma=gamma, lam=1.0)
    kept_BT = rewards_BT * mask_BT
    powers_T = gamma ** torch.arange(7.0)
    returns_BT = (kept_BT * powers_T).flip(1).cumsum(1).flip(1) / powers_T
    torch.testing.assert_close(actual, (returns_BT - values_BT) * mask_BT, rtol=1e-5, atol=1e-5)


def test_lambda_0_is_the_one_step_error() -> None:
    rewards_BT, values_BT, mask_BT = batch(1)
    actual = generalized_advantages(rewards_BT, values_BT, mask_BT, gamma=1.0, lam=0.0)
    after_BT = torch.cat([(values_BT * mask_BT)[:, 1:], torch.zeros(5, 1)], dim=1)
    torch.testing.assert_close(actual, (rewards_BT + after_BT - values_BT) * mask_BT)


@given(seed=st.integers(0, 10_000), lam=st.sampled_from([0.9, 0.95, 1.0]), padding=st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_padding_cannot_reach_a_token(seed: int, lam: float, padding: int) -> None:
    rewards_BT, values_BT, mask_BT = batch(seed)
    expected = generalized_advantages(rewards_BT, values_BT, mask_BT, gamma=1.0, lam=lam)

    def pad(x_BT: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.where(mask_BT, x_BT, torch.nan), torch.full((5, padding), torch.nan)], dim=1)

    wide_mask_BT = torch.cat([mask_BT, torch.zeros(5, padding, dtype=torch.bool)], dim=1)
    actual = generalized_advantages(pad(rewards_BT), pad(values_BT), wide_mask_BT, gamma=1.0, lam=lam)
    torch.testing.assert_close(actual[:, :7], expected)
    assert actual[:, 7:].eq(0).all()
