"""KL estimators: exact expectations over a small vocabulary."""

from __future__ import annotations

import pytest
import torch

from app.numerics import adapted_coefficient, k1, k2, k3


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


@pytest.mark.parametrize(("estimator", "forward"), [(k2, False), (k3, True)])
def test_what_an_estimator_descends_as_a_loss(estimator: object, forward: bool) -> None:
    """Over all tokens with their probabilities: k2 has the gradient of KL(p || q), k3 that of KL(q || p), k1 none at all."""
    _, q = distributions()
    logits = torch.randn(9, dtype=torch.float64, generator=torch.Generator().manual_seed(8)).requires_grad_()
    p = logits.log_softmax(-1)
    exact = torch.nn.functional.kl_div(*((p, q) if forward else (q, p)), log_target=True, reduction="sum")
    (expected,) = torch.autograd.grad(exact, logits, retain_graph=True)
    (actual,) = torch.autograd.grad((p.detach().exp() * estimator(p, q)).sum(), logits, retain_graph=True)  # type: ignore[operator]
    torch.testing.assert_close(actual, expected)
    (nothing,) = torch.autograd.grad((p.detach().exp() * k1(p, q)).sum(), logits)
    torch.testing.assert_close(nothing, torch.zeros(9, dtype=torch.float64))


def test_importance_weights_keep_the_gradient_when_another_policy_sampled() -> None:
    """Tokens drawn from b instead of p, each weighted by the detached p / b."""
    b, q = distributions()
    logits = torch.randn(9, dtype=torch.float64, generator=torch.Generator().manual_seed(8)).requires_grad_()
    p = logits.log_softmax(-1)
    exact = torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum")
    (expected,) = torch.autograd.grad(exact, logits, retain_graph=True)
    weight = (p - b).exp().detach()
    (actual,) = torch.autograd.grad((b.exp() * weight * k2(p, q)).sum(), logits)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        # coef 0.1, target 6, horizon 1000, 100 sequences: at most 0.2 * 100 / 1000 = 2 % either way
        (6.0, 0.1),
        (6.6, 0.101),  # error 0.1
        (60.0, 0.102),  # error 9, cut to 0.2
        (5.4, 0.099),
        (0.0, 0.098),  # error -1, cut to -0.2
        (-3.0, 0.098),  # an estimate may be negative
    ],
)
def test_adaptive_coefficient_table(kl: float, expected: float) -> None:
    assert adapted_coefficient(0.1, kl, target=6.0, horizon=1000, sequences=100) == pytest.approx(expected)


def test_adaptive_coefficient_counts_sequences() -> None:
    """Ten updates of 10 sequences move it as far as one of 100 would, to first order; none at all leaves it."""
    coef = 0.1
    for _ in range(10):
        coef = adapted_coefficient(coef, 9.0, target=6.0, horizon=1000, sequences=10)
    assert coef == pytest.approx(adapted_coefficient(0.1, 9.0, target=6.0, horizon=1000, sequences=100), rel=1e-3)
    assert adapted_coefficient(0.1, 9.0, target=6.0, horizon=1000, sequences=0) == 0.1
