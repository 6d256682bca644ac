"""A gradient that is not finite stops the step. With real engines of DeepSpeed: tests/local_ray/test_engine_steps.py."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from app.errors import NonFiniteError
from app.workers.deepspeed_engine import optimizer_step


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_without_zero_the_optimizer_never_sees_it(value: float) -> None:
    module = torch.nn.Linear(2, 2)
    module.weight.grad = torch.ones(2, 2)
    module.bias.grad = torch.tensor([0.0, value])
    steps: list[None] = []
    engine: Any = SimpleNamespace(
        is_gradient_accumulation_boundary=lambda: True, zero_optimization_stage=lambda: 0, module=module, step=lambda: steps.append(None)
    )
    with pytest.raises(NonFiniteError, match=rf"^policy, optimizer step 8: the gradient norm is {value}, before the step: lower the"):
        optimizer_step(engine, "policy, optimizer step 8")
    assert not steps
    module.bias.grad = torch.zeros(2)
    assert optimizer_step(engine) == 2.0 and len(steps) == 1


def engine_of(norm: float, *, fp16: bool, applied: bool) -> Any:
    """What `optimizer_step` asks of an engine with ZeRO."""
    return SimpleNamespace(
        is_gradient_accumulation_boundary=lambda: True,
        zero_optimization_stage=lambda: 1,
        step=lambda: None,
        get_global_grad_norm=lambda: torch.tensor(norm),
        fp16_enabled=lambda: fp16,
        was_step_applied=lambda: applied,
    )


def test_loss_scaling_may_skip_a_step_and_nothing_else_may() -> None:
    assert optimizer_step(engine_of(math.inf, fp16=True, applied=False)) == math.inf
    with pytest.raises(NonFiniteError, match="the gradient norm is inf, and DeepSpeed has skipped the step: "):
        optimizer_step(engine_of(math.inf, fp16=False, applied=False))


def test_a_step_that_was_taken_all_the_same_is_told() -> None:
    with pytest.raises(NonFiniteError, match=r"^critic: the gradient norm is nan, and the weights have taken it: go on from "):
        optimizer_step(engine_of(math.nan, fp16=False, applied=True), "critic")
    with pytest.raises(NonFiniteError, match="the weights have taken it"):  # loss scaling skips what it does not want
        optimizer_step(engine_of(math.nan, fp16=True, applied=True))
