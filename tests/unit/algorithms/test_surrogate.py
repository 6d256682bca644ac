"""The loss that all algorithms share: lag weights, KL terms and entropy bonus, by hand and by their gradients."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace

import pytest
import torch

from app.algorithms import ALGORITHMS
from app.algorithms.ppo import Ppo, PpoOptions
from app.algorithms.surrogate import Surrogate, SurrogateConfig
from app.experience import Minibatch, PolicyOutputs, Totals
from tests.bigram_models import Models, one_row, sample_experience, sum_of_losses

ROWS = [range(8)]
THREE = Totals(tokens=3, sequences=1)


def minibatch_of(**changes: object) -> Minibatch:
    """One row of three tokens with advantages 1, 1, -1; proximal -1, -2, -1, reference -1.5, -1, -3."""
    credited = Ppo(PpoOptions()).credit(one_row(), kl_coef=0.5)
    minibatch = Minibatch.from_rows(credited, torch.tensor([0]))
    return replace(minibatch, **{"advantages_BT": torch.tensor([[1.0, 1.0, -1.0]]), **changes})  # type: ignore[arg-type]


def outputs_of(logprobs_BT: torch.Tensor) -> PolicyOutputs:
    return PolicyOutputs(logprobs_BT, None, torch.tensor([[1.0, 2.0, 4.5]]))


def test_lag_weights_the_policy_loss_only_where_asked() -> None:
    models, ppo, late = Models.after(4), Ppo(PpoOptions()), Ppo(PpoOptions(), Surrogate(max_lag=1))
    credited = ppo.credit(sample_experience(4), kl_coef=0.1)
    fresh = replace(credited, behaviour_BT=credited.proximal_BT)
    assert sum_of_losses(ppo, models, credited, ROWS).policy == sum_of_losses(ppo, models, fresh, ROWS).policy
    lagging = sum_of_losses(late, models, credited, ROWS)
    assert lagging.policy != sum_of_losses(ppo, models, credited, ROWS).policy
    torch.testing.assert_close(sum_of_losses(late, models, fresh, ROWS).policy, sum_of_losses(ppo, models, fresh, ROWS).policy)
    assert lagging.value == sum_of_losses(ppo, models, credited, ROWS).value
    weights_BT = (credited.proximal_BT - credited.behaviour_BT).exp().clamp(max=2.0)
    assert lagging.metrics["importance_mean"] == pytest.approx(weights_BT[credited.mask_BT].mean().item(), rel=1e-5)


def test_lag_weight_is_cut_at_max_importance() -> None:
    """Behaviour far below proximal: at ratio 1 each token's loss is -A * max_importance, and so is its gradient."""
    surrogate = Surrogate(SurrogateConfig(max_importance=1.5), max_lag=1)
    minibatch = minibatch_of(behaviour_BT=torch.full((1, 3), -9.0))
    logprobs_BT = minibatch.proximal_BT.clone().requires_grad_()
    loss, metrics = surrogate.loss(outputs_of(logprobs_BT), minibatch, THREE)
    loss.backward()
    torch.testing.assert_close(loss.detach(), -1.5 * minibatch.advantages_BT.mean())
    torch.testing.assert_close(logprobs_BT.grad, -1.5 * minibatch.advantages_BT / 3)
    assert metrics["importance_mean"].item() == 1.5


@pytest.mark.parametrize("form", ["k2", "k3"])
def test_kl_in_the_loss_table(form: str) -> None:
    """At the first step, where current = proximal: differences to the reference 0.5, -1, 2; the batch's coefficient is 0.5."""
    kl = {"k2": (0.125 + 0.5 + 2) / 3, "k3": (math.exp(-0.5) - 0.5 + math.exp(1) - 2 + math.exp(-2) + 1) / 3}[form]
    minibatch = minibatch_of()
    logprobs_BT = minibatch.proximal_BT.clone().requires_grad_()
    plain, _ = Surrogate().loss(outputs_of(logprobs_BT), minibatch, THREE)
    loss, metrics = Surrogate(kl_in_loss=form).loss(outputs_of(logprobs_BT), minibatch, THREE)  # type: ignore[arg-type]
    assert metrics["kl_loss"].item() == pytest.approx(kl, rel=1e-5)
    assert (loss - plain).item() == pytest.approx(0.5 * kl, rel=1e-5)
    (gradient,) = torch.autograd.grad(loss - plain, logprobs_BT)
    apart = torch.tensor([[0.5, -1.0, 2.0]])
    expected = apart if form == "k2" else 1 - (-apart).exp()
    torch.testing.assert_close(gradient, 0.5 * expected / 3)


@pytest.mark.parametrize("max_lag", [0, 1])
def test_kl_in_the_loss_is_weighted_where_another_policy_sampled(max_lag: int) -> None:
    """Gradients of k2 are w * (current - reference), w = min(current / sampler, 2): the sampler is the proximal policy of this batch,
    or with lag the behaviour policy; w itself has no gradient."""
    behaviour_BT = torch.tensor([[-1.2, -2.0, -9.0]])
    minibatch = minibatch_of(behaviour_BT=behaviour_BT)
    current_BT = (minibatch.proximal_BT + torch.tensor([[0.3, 0.0, -0.2]])).requires_grad_()
    surrogate = Surrogate(max_lag=max_lag)
    plain, _ = surrogate.loss(outputs_of(current_BT), minibatch, THREE)
    loss, _ = replace(surrogate, kl_in_loss="k2").loss(outputs_of(current_BT), minibatch, THREE)
    (gradient,) = torch.autograd.grad(loss - plain, current_BT)
    sampler_BT = behaviour_BT if max_lag else minibatch.proximal_BT
    weights_BT = (current_BT - sampler_BT).exp().clamp(max=2.0).detach()
    torch.testing.assert_close(gradient, 0.5 * weights_BT * (current_BT - minibatch.reference_BT).detach() / 3)


def test_entropy_bonus_is_subtracted() -> None:
    minibatch = minibatch_of()
    entropy_BT = torch.tensor([[1.0, 2.0, 4.5]], requires_grad=True)
    outputs = PolicyOutputs(minibatch.proximal_BT, None, entropy_BT)
    plain, _ = Surrogate().loss(outputs, minibatch, THREE)
    loss, metrics = Surrogate(SurrogateConfig(entropy_coef=0.01)).loss(outputs, minibatch, THREE)
    assert metrics["entropy"].item() == 2.5
    assert (loss - plain).item() == pytest.approx(-0.025)
    loss.backward()
    torch.testing.assert_close(entropy_BT.grad, torch.full((1, 3), -0.01 / 3))
    assert not plain.requires_grad


def test_terms_share_the_mean_over_sequences() -> None:
    """Two rows of one and three tokens: per sequence the first token weighs three times as much in every term."""
    models, surrogate = Models.after(9), Surrogate(SurrogateConfig(entropy_coef=0.1), kl_in_loss="k3")
    credited = Ppo(PpoOptions()).credit(sample_experience(9), kl_coef=0.2)
    everything = Minibatch.from_rows(credited, torch.arange(8))
    totals = Totals(tokens=int(credited.mask_BT.sum()), sequences=8)
    actual, _ = surrogate.loss(models.outputs(everything.tokens), everything, totals, per_sequence=True)
    expected = []
    for row in range(8):
        alone = Minibatch.from_rows(credited, torch.tensor([row]))
        tokens = Totals(tokens=int(credited.mask_BT[row].sum()), sequences=1)
        expected.append(surrogate.loss(models.outputs(alone.tokens), alone, tokens)[0])
    torch.testing.assert_close(actual, torch.stack(expected).mean())


def test_every_algorithm_travels_to_workers() -> None:
    for name, algorithm in ALGORITHMS.items():
        instance = algorithm(algorithm.options(), Surrogate(max_lag=2, kl_in_loss="k3"))
        assert pickle.loads(pickle.dumps(instance)) == instance, name
