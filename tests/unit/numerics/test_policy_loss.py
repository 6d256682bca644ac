"""Clipped losses: where gradient flows and where it must not."""

from __future__ import annotations

import pytest
import torch

from app.numerics import clipped_policy_loss, clipped_value_loss, truncated_importance

MASK = torch.tensor([[True, True, False]])


def test_policy_gradient_of_an_unclipped_token_is_minus_advantage_times_ratio() -> None:
    current = torch.tensor([[0.1, -0.05, 3.0]], requires_grad=True)
    result = clipped_policy_loss(current, torch.zeros(1, 3), torch.tensor([[2.0, -1.0, 5.0]]), MASK, clip=0.2, total_tokens=10)
    result.loss.backward()
    ratio = current.detach().exp()
    expected = torch.tensor([[-2.0, 1.0, 0.0]]) * ratio / 10
    torch.testing.assert_close(current.grad, expected)


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "follows"), [(0.5, 1.0, False), (0.5, -1.0, True), (-0.5, 1.0, True), (-0.5, -1.0, False)]
)
def test_clip_stops_only_moves_that_go_further_the_way_the_advantage_points(log_ratio: float, advantage: float, follows: bool) -> None:
    current = torch.tensor([[log_ratio]], requires_grad=True)
    result = clipped_policy_loss(current, torch.zeros(1, 1), torch.tensor([[advantage]]), torch.tensor([[True]]), clip=0.2, total_tokens=1)
    result.loss.backward()
    assert current.grad is not None
    assert bool(current.grad.ne(0).item()) is follows
    assert bool(result.clip_fraction.item()) is not follows


def test_masked_nan_and_infinity_reach_neither_losses_nor_gradients() -> None:
    bad = torch.tensor([[0.0, 0.0, torch.nan]])
    current = torch.tensor([[0.0, 0.0, 500.0]], requires_grad=True)  # exp(500) overflows
    values = torch.tensor([[0.0, 0.0, torch.inf]], requires_grad=True)
    policy = clipped_policy_loss(current, bad, bad + 1, MASK, clip=0.2, total_tokens=2, weights_BT=bad + 1)
    value = clipped_value_loss(values, bad, bad + 1, MASK, clip=0.2, total_tokens=2)
    (policy.loss + value.loss).backward()
    assert policy.loss.item() == -1.0
    assert value.loss.item() == 0.5
    assert current.grad is not None
    assert current.grad.tolist() == [[-0.5, -0.5, 0.0]]
    assert values.grad is not None
    assert values.grad.tolist() == [[-0.5, -0.5, 0.0]]


def test_importance_carries_no_gradient_and_ignores_masked_entries() -> None:
    proximal = torch.tensor([[0.3, 1.0, torch.nan]], requires_grad=True)
    weights = truncated_importance(proximal, torch.zeros(1, 3), MASK, maximum=2.0)
    assert not weights.requires_grad
    torch.testing.assert_close(weights, torch.tensor([[0.3, 0.0, 0.0]]).exp().clamp(max=2.0) + torch.tensor([[0.0, 1.0, 0.0]]))


@pytest.mark.parametrize("clip", [None, 0.2])
def test_value_gradient_near_the_old_value_is_the_error(clip: float | None) -> None:
    values = torch.tensor([[1.1, 0.9, 4.0]], requires_grad=True)
    clipped_value_loss(values, torch.ones(1, 3), torch.tensor([[2.0, 3.0, 9.0]]), MASK, clip=clip, total_tokens=5).loss.backward()
    torch.testing.assert_close(values.grad, torch.tensor([[-0.9 / 5, -2.1 / 5, 0.0]]))
