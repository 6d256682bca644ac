"""KL estimators: exact expectations over a small vocabulary."""

from __future__ import annotations

import torch

from app.numerics import k1, k3


def distributions() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(4)
    return torch.randn(2, 9, dtype=torch.float64).log_softmax(-1).unbind()


def test_both_estimators_have_the_kl_as_their_mean() -> None:
    p, q = distributions()
    exact = torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum")
    for estimator in (k1, k3):
        torch.testing.assert_close((p.exp() * estimator(p, q)).sum(), exact)


def test_k3_is_never_negative_and_zero_at_equality() -> None:
    p, q = distributions()
    assert k3(p, q).ge(0).all()
    assert k3(q, p).ge(0).all()
    assert k1(p, q).lt(0).any()
    assert k3(p, p).eq(0).all()
    assert k1(p, p).eq(0).all()


def test_k3_is_precise_for_close_policies() -> None:
    # For a difference d the estimate is d^2 / 2; exp(d) - 1 - d in float32 would round it to 0 or worse.
    difference = torch.tensor([1e-3])
    torch.testing.assert_close(k3(torch.zeros(1), difference), difference**2 / 2, rtol=1e-3, atol=0)
