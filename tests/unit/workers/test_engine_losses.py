"""Who descends what: policy and critic apart, together, or one of them alone."""

from __future__ import annotations

import pytest
import torch

from app.experience import Loss
from app.workers.engine_losses import engine_losses

POLICY, VALUE = torch.tensor(3.0), torch.tensor(5.0)


@pytest.mark.parametrize(
    ("value", "value_head", "policy_learns", "expected"),
    [
        (VALUE, False, True, {"policy": 3, "critic": 5}),
        (VALUE, False, False, {"critic": 5}),
        (VALUE, True, True, {"policy": 8}),
        (VALUE, True, False, {"policy": 5}),
        (None, False, True, {"policy": 3}),
    ],
)
def test_losses_by_engine(value: torch.Tensor | None, value_head: bool, policy_learns: bool, expected: dict[str, float]) -> None:
    assert engine_losses(Loss(POLICY, value), value_head=value_head, policy_learns=policy_learns) == expected
