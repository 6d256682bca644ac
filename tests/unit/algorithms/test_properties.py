"""What no algorithm's results may depend on: padding, micro-batches, ranks, row order; and where its gradient must be zero."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from app.algorithms import ALGORITHMS
from app.algorithms.algorithm import Algorithm
from app.algorithms.surrogate import Surrogate, SurrogateConfig
from app.experience import Experience, Loss, Minibatch, Totals
from tests.bigram_models import ALGORITHM_CASES, ROWS, Models, lagging, sample_experience, sum_of_losses

CLOSE = {"rtol": 1e-9, "atol": 1e-10}  # everything here is float64
KL_COEF = 0.1
seeds = st.integers(0, 10_000)
properties = settings(max_examples=4, deadline=None)
for_all = pytest.mark.parametrize("algorithm", ALGORITHM_CASES.values(), ids=ALGORITHM_CASES.keys())
EVERYTHING = [range(ROWS)]


def credited_fields(experience: Experience) -> dict[str, torch.Tensor]:
    fields = {"rewards": experience.rewards_BT, "advantages": experience.advantages_BT, "returns": experience.returns_BT}
    return {name: x for name, x in fields.items() if x is not None}


def assert_same_step(actual: Loss, expected: Loss, models: Models, undecided: float = 0.0) -> None:
    assert actual.metrics.keys() == expected.metrics.keys()
    for name in expected.metrics:
        tolerance = 1e-6 + (undecided if name == "clip_fraction" else 0.0)
        assert actual.metrics[name] == pytest.approx(expected.metrics[name], rel=1e-5, abs=tolerance), name
    torch.testing.assert_close(actual.policy, expected.policy, **CLOSE)
    torch.testing.assert_close(actual.value, expected.value, **CLOSE)
    for ours, theirs in zip(models.gradients(actual), models.gradients(expected), strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


def undecided(experience: Experience) -> float:
    """Share of tokens whose advantage is 0 but for rounding: on which side of it, and so whether a clip decides, the order of sums says."""
    assert experience.advantages_BT is not None
    advantages = experience.advantages_BT[experience.mask_BT]
    return float((advantages.abs() < 1e-9).double().mean()) if len(advantages) else 0.0


def test_every_algorithm_has_a_case() -> None:
    assert {type(algorithm) for algorithm in ALGORITHM_CASES.values()} == set(ALGORITHMS.values())


@for_all
@given(seed=seeds, padding=st.integers(1, 6))
@properties
def test_padding(algorithm: Algorithm[Any], seed: int, padding: int) -> None:
    models = Models.after(seed)
    tight = algorithm.credit(sample_experience(seed, algorithm), kl_coef=KL_COEF)
    wide = algorithm.credit(sample_experience(seed, algorithm, padding), kl_coef=KL_COEF)
    length = tight.mask_BT.shape[1]
    for name, x_BT in credited_fields(wide).items():
        torch.testing.assert_close(x_BT[:, :length], credited_fields(tight)[name], **CLOSE)
        assert x_BT[:, length:].eq(0).all()
    assert_same_step(sum_of_losses(algorithm, models, wide, EVERYTHING), sum_of_losses(algorithm, models, tight, EVERYTHING), models)
    # `Minibatch.from_rows` cuts padding off, so the loss is also given the wide tensors as they are.
    assert wide.advantages_BT is not None and wide.returns_BT is not None
    everything = Minibatch(
        wide.tokens,
        wide.behaviour_BT,
        wide.proximal_BT,
        wide.reference_BT,
        wide.values_BT,
        wide.advantages_BT,
        wide.returns_BT,
        wide.kl_coef,
    )
    late = lagging(algorithm, 1)
    uncut = late.loss(models.outputs(wide.tokens), everything, Totals(tokens=int(wide.mask_BT.sum()), sequences=ROWS))
    assert_same_step(uncut, sum_of_losses(late, models, tight, EVERYTHING), models)


@for_all
@given(seed=seeds, micro_batch=st.sampled_from([1, 2, 3, 4]), max_lag=st.sampled_from([0, 1]))
@properties
def test_micro_batches(algorithm: Algorithm[Any], seed: int, micro_batch: int, max_lag: int) -> None:
    algorithm, models = lagging(algorithm, max_lag), Models.after(seed)
    credited = algorithm.credit(sample_experience(seed, algorithm), kl_coef=KL_COEF)
    parts = [range(start, min(start + micro_batch, ROWS)) for start in range(0, ROWS, micro_batch)]
    assert_same_step(sum_of_losses(algorithm, models, credited, parts), sum_of_losses(algorithm, models, credited, EVERYTHING), models)


@for_all
@given(seed=seeds, ranks=st.sampled_from([2, 4]), micro_batch=st.sampled_from([1, 2]))
@properties
def test_ranks(algorithm: Algorithm[Any], seed: int, ranks: int, micro_batch: int) -> None:
    """Rows dealt out to ranks, each splitting its own into micro-batches; gradients are summed over ranks."""
    models = Models.after(seed)
    credited = algorithm.credit(sample_experience(seed, algorithm), kl_coef=KL_COEF)
    hands = [list(range(rank, ROWS, ranks)) for rank in range(ranks)]
    parts = [hand[start : start + micro_batch] for hand in hands for start in range(0, len(hand), micro_batch)]
    assert_same_step(sum_of_losses(algorithm, models, credited, parts), sum_of_losses(algorithm, models, credited, EVERYTHING), models)


@for_all
@given(seed=seeds, order=st.permutations(range(ROWS)))
@properties
def test_row_order(algorithm: Algorithm[Any], seed: int, order: list[int]) -> None:
    models, index = Models.after(seed), torch.tensor(order)
    experience = sample_experience(seed, algorithm)
    straight = algorithm.credit(experience, kl_coef=KL_COEF)
    turned = algorithm.credit(rows_of(experience, index), kl_coef=KL_COEF)
    for name, x_BT in credited_fields(turned).items():
        torch.testing.assert_close(x_BT, credited_fields(straight)[name][index], **CLOSE)
    assert_same_step(sum_of_losses(algorithm, models, turned, EVERYTHING), sum_of_losses(algorithm, models, straight, EVERYTHING), models)


def rows_of(experience: Experience, index: torch.Tensor) -> Experience:
    """A batch of some rows alone, cut to the longest response among them."""
    tokens = experience.tokens.rows(index)
    length = tokens.mask_BT.shape[1]
    tensors = {name: getattr(experience, name)[index, :length] for name in ("behaviour_BT", "proximal_BT", "reference_BT")}
    values_BT = None if experience.values_BT is None else experience.values_BT[index, :length]
    assert experience.groups_B is not None
    return Experience(tokens, experience.scores_B[index], values_BT=values_BT, groups_B=experience.groups_B[index], **tensors)


@for_all
@pytest.mark.parametrize("max_lag", [0, 1])
def test_no_derivative_at_masked_positions(algorithm: Algorithm[Any], max_lag: int) -> None:
    """The outputs are filled with numbers where masked: none of them may matter, and every unmasked one must."""
    # Bounds far away, so that no unmasked token is without gradient for another reason.
    far = SurrogateConfig(clip=0.99, clip_high=50.0, entropy_coef=algorithm.surrogate.config.entropy_coef)
    algorithm = replace(algorithm, surrogate=replace(algorithm.surrogate, config=far, max_lag=max_lag))
    if algorithm.has_critic:
        algorithm = replace(algorithm, config=algorithm.config.model_copy(update={"value_clip": None}))
    credited = algorithm.credit(sample_experience(5, algorithm), kl_coef=KL_COEF)
    minibatch = Minibatch.from_rows(credited, torch.arange(ROWS))
    mask_BT = minibatch.mask_BT
    with torch.no_grad():
        outputs = Models.after(5).outputs(minibatch.tokens)
    noise_BT = torch.where(mask_BT, 0.0, 3.0)
    assert outputs.values_BT is not None
    logprobs_BT, values_BT = (outputs.logprobs_BT + noise_BT).requires_grad_(), (outputs.values_BT + noise_BT).requires_grad_()
    entropy_BT = (outputs.entropy_BT + noise_BT).requires_grad_()
    filled = replace(outputs, logprobs_BT=logprobs_BT, values_BT=values_BT, entropy_BT=entropy_BT)
    totals = Totals(tokens=int(mask_BT.sum()), sequences=ROWS)
    loss, clean = algorithm.loss(filled, minibatch, totals), algorithm.loss(outputs, minibatch, totals)
    assert loss.metrics == pytest.approx(dict(clean.metrics))
    (loss.policy if loss.value is None else loss.policy + loss.value).backward()
    read = [logprobs_BT, *([values_BT] if algorithm.has_critic else []), *([entropy_BT] if far.entropy_coef else [])]
    for x_BT in read:
        assert x_BT.grad is not None
        assert x_BT.grad[~mask_BT].eq(0).all()
        assert x_BT.grad[mask_BT].ne(0).float().mean() > 0.9


@for_all
def test_masked_nan_reaches_nothing(algorithm: Algorithm[Any]) -> None:
    credited = algorithm.credit(sample_experience(5, algorithm), kl_coef=KL_COEF)
    models, minibatch = Models.after(5), Minibatch.from_rows(credited, torch.arange(ROWS))
    holes = {
        name: torch.where(minibatch.mask_BT, x, math.nan)
        for name in ("behaviour_BT", "proximal_BT", "reference_BT", "old_values_BT", "advantages_BT", "returns_BT")
        if (x := getattr(minibatch, name)) is not None
    }
    totals = Totals(tokens=int(credited.mask_BT.sum()), sequences=ROWS)
    late = lagging(algorithm, 1)
    outputs = models.outputs(minibatch.tokens)
    actual = late.loss(outputs, replace(minibatch, **holes), totals)
    read = [outputs.logprobs_BT, *([outputs.values_BT] if algorithm.has_critic else [])]
    total = actual.policy if actual.value is None else actual.policy + actual.value
    # Where the models end, not behind them: a later mask may hide a NaN there.
    for gradient_BT in torch.autograd.grad(total, read, retain_graph=True):
        assert gradient_BT[~minibatch.mask_BT].eq(0).all()
    assert_same_step(actual, late.loss(models.outputs(minibatch.tokens), minibatch, totals), models)


@for_all
@pytest.mark.parametrize("max_lag", [0, 1])
def test_zero_advantage_gives_zero_policy_gradient(algorithm: Algorithm[Any], max_lag: int) -> None:
    """Without entropy bonus and KL in the loss, which pull whatever the advantages are."""
    algorithm, models = replace(algorithm, surrogate=Surrogate(max_lag=max_lag)), Models.after(6)
    credited = algorithm.credit(sample_experience(6, algorithm), kl_coef=KL_COEF)
    assert credited.advantages_BT is not None
    flat = replace(credited, advantages_BT=torch.zeros_like(credited.advantages_BT))
    for experience, expected_zero in [(flat, True), (credited, False)]:
        policy_gradient, critic_gradient = models.gradients(sum_of_losses(algorithm, models, experience, EVERYTHING))
        assert bool(policy_gradient.eq(0).all()) is expected_zero
        assert bool(critic_gradient.ne(0).any()) is algorithm.has_critic


@for_all
@given(seed=seeds)
@properties
def test_first_step(algorithm: Algorithm[Any], seed: int) -> None:
    """Before any update every ratio is 1, and the policy gradient is that of -sum A log p over the denominator."""
    models = Models.before(seed)
    algorithm = replace(algorithm, surrogate=Surrogate())
    credited = algorithm.credit(sample_experience(seed, algorithm), kl_coef=KL_COEF)
    loss = sum_of_losses(algorithm, models, credited, EVERYTHING)
    assert loss.metrics["ratio_mean"] == pytest.approx(1, abs=1e-6)
    assert loss.metrics["approx_kl"] == pytest.approx(0, abs=1e-12)
    assert loss.metrics["clip_fraction"] == loss.metrics.get("value_clip_fraction", 0) == 0
    policy_gradient, _ = models.gradients(loss)
    assert credited.advantages_BT is not None
    objective_BT = -credited.advantages_BT * models.outputs(credited.tokens).logprobs_BT
    lengths_B = credited.mask_BT.sum(1)
    objective = objective_BT.sum() / lengths_B.sum() if algorithm.token_sums else (objective_BT.sum(1) / lengths_B).mean()
    torch.testing.assert_close(policy_gradient, torch.autograd.grad(objective, models.policy_VV)[0], **CLOSE)


@for_all
@given(seed=seeds, failed=st.sets(st.integers(0, ROWS - 1), min_size=1, max_size=6))
@example(seed=3748, failed={0, 1, 2, 3})  # one sample of each prompt is left: with a group baseline every advantage is 0
@properties
def test_failed_rows_count_nowhere(algorithm: Algorithm[Any], seed: int, failed: set[int]) -> None:
    """A batch with failed scores trains exactly as the batch without those rows."""
    models, experience = Models.after(seed), sample_experience(seed, algorithm)
    scores_B = experience.scores_B.clone()
    scores_B[list(failed)] = math.nan
    kept = torch.tensor(sorted(set(range(ROWS)) - failed))
    masked = algorithm.credit(replace(experience, scores_B=scores_B), kl_coef=KL_COEF)
    alone = algorithm.credit(rows_of(experience, kept), kl_coef=KL_COEF)
    assert not masked.mask_BT[list(failed)].any()
    length = alone.mask_BT.shape[1]
    for name, x_BT in credited_fields(masked).items():
        torch.testing.assert_close(x_BT[kept, :length], credited_fields(alone)[name], **CLOSE)
        assert x_BT[list(failed)].eq(0).all()
    actual, expected = sum_of_losses(algorithm, models, masked, EVERYTHING), sum_of_losses(algorithm, models, alone, [range(len(kept))])
    assert_same_step(actual, expected, models, undecided(alone))
