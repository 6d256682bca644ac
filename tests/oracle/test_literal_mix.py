"""One optimizer step of a policy with a value head and a pretraining mix, as the learner adds it up, against the literal sum.

The literal side is that of test_literal_update, one sequence at a time; the loss on other text is a plain log-softmax, token by token.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from app.config.ppo import PpoConfig
from app.data.token_cache import SftRow, write_threads
from app.experience import Minibatch, Totals
from app.models.heads import ValueHead
from app.models.policy import PolicyModel
from app.models.segments import attend_by_segment
from app.workers.engine_losses import engine_losses
from app.workers.pretraining import PretrainingMix, summed_loss
from tests.oracle.test_literal_update import (
    CASES,
    KL_COEF,
    Setup,
    credited_batch,
    forward,
    gradients_of,
    literal_loss,
    literal_rows,
    setup,
)
from tests.tiny_models import VOCABULARY

__all__ = ["setup"]  # the fixture
ALGORITHM, SETTINGS = CASES["ppo"]
COEF = 0.7


def head_of(seed: int) -> ValueHead:
    head = ValueHead(64, seed=0).double()
    torch.manual_seed(seed)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return head


@pytest.fixture
def shared(setup: Setup) -> Setup:
    """The critic is a head on the policy."""
    return setup._replace(critic=PolicyModel(setup.policy, head_of(1)), old_critic=PolicyModel(setup.proximal, head_of(2)))


def texts(count: int, seed: int = 0) -> list[SftRow]:
    draw = np.random.default_rng(seed)
    rows = [draw.integers(4, VOCABULARY, size).astype(np.int32) for size in draw.integers(2, 14, count)]
    return [SftRow(ids, np.r_[False, np.arange(len(ids) - 1) % 3 != 1]) for ids in rows]


def mix_of(folder: Path, rank: int, world: int, micro_batch_size: int) -> PretrainingMix:
    mix = {"path": "texts", "coef": COEF, "batch_size": 8, "micro_batch_size": micro_batch_size}
    config = PpoConfig.model_validate({"pretraining": mix, "workers": {"count": world}})
    file = folder / "texts.arrow"
    write_threads(texts(20), file)
    return PretrainingMix(file, config, 3, rank, world, torch.device("cpu"), padded=True)


def literal_mix(policy: torch.nn.Module, rows: list[SftRow]) -> torch.Tensor:
    """Mean of -log p over the target tokens of all rows."""
    losses = []
    for row in rows:
        ids = torch.from_numpy(row.ids.astype(np.int64))
        logits_SV = policy(ids[None]).logits[0]
        for place in row.loss_mask.nonzero()[0]:
            distribution_V = logits_SV[place - 1].exp() / logits_SV[place - 1].exp().sum()
            losses.append(-distribution_V[ids[place]].log())
    return torch.stack(losses).mean()


def test_gradients_of_both_losses_and_the_mix(shared: Setup, tmp_path: Path) -> None:
    """What one engine descends, from uneven micro-batches of rollouts and of texts on two ranks."""
    settings, model = replace(SETTINGS, kl_coef=KL_COEF), shared.critic
    assert isinstance(model, PolicyModel)
    rows, credited = literal_rows(shared, ALGORITHM, settings), credited_batch(shared, ALGORITHM)
    parameters = list(model.parameters())
    policy, value = literal_loss(shared, rows, settings, ALGORITHM)
    mixes = [mix_of(tmp_path, rank, 2, micro_batch_size) for rank, micro_batch_size in ((0, 4), (1, 4))]
    chosen = [row for mix in mixes for batch in mix.batches(5)[0] for row in batch]
    expected = gradients_of(policy + value + COEF * literal_mix(shared.policy, chosen), parameters)

    found = [torch.zeros_like(p) for p in parameters]
    totals = Totals(tokens=int(credited.mask_BT.sum()), sequences=len(rows))
    losses = []
    for part in ([0, 3], [5, 1, 4], [2]):
        minibatch = Minibatch.from_rows(credited, torch.tensor(part))
        loss = ALGORITHM.loss(forward(shared.policy, model, minibatch.tokens), minibatch, totals)
        losses.append(engine_losses(loss, value_head=True, policy_learns=True)["policy"])
    for mix in mixes:
        batches, targets = mix.batches(5)
        losses += [COEF * summed_loss(model, batch, torch.device("cpu")) / targets for batch in batches]
    for one in losses:
        found = [total + added for total, added in zip(found, gradients_of(one, parameters), strict=True)]
    largest = max(float(gradient.abs().max()) for gradient in expected)
    assert largest > 1e-3
    assert max(float((ours - theirs).abs().max()) for ours, theirs in zip(found, expected, strict=True)) < 1e-5 * largest


def test_the_loss_on_texts_depends_on_neither_padding_nor_micro_batches_nor_ranks(shared: Setup, tmp_path: Path) -> None:
    model, packed = PolicyModel(shared.policy), copy.deepcopy(shared.policy)
    assert attend_by_segment(packed)

    def mean(policy: PolicyModel, world: int, micro_batch_size: int) -> float:
        total = 0.0
        for rank in range(world):
            batches, targets = mix_of(tmp_path, rank, world, micro_batch_size).batches(1)
            total += sum(summed_loss(policy, batch, torch.device("cpu")).item() for batch in batches) / targets
        return total

    expected = mean(model, 1, 8)
    for policy, world, micro_batch_size in ((model, 1, 1), (model, 2, 2), (model, 4, 1), (PolicyModel(packed), 1, 8)):
        assert mean(policy, world, micro_batch_size) == pytest.approx(expected, rel=1e-6)


def test_tokens_that_are_no_target_have_no_gradient(shared: Setup) -> None:
    seen: list[torch.Tensor] = []

    def policy(*arguments: Any) -> Any:
        outputs = PolicyModel(shared.policy)(*arguments)
        outputs[0].retain_grad()
        seen.append(outputs[0])
        return outputs

    rows = texts(5)
    summed_loss(policy, rows, torch.device("cpu")).backward()
    shared.policy.zero_grad()
    (logprobs_BR,) = seen
    expected_BR = torch.zeros(logprobs_BR.shape)
    for expected_R, row in zip(expected_BR, rows, strict=True):
        expected_R[: len(row.ids) - 1] = -torch.from_numpy(row.loss_mask[1:]).float()
    assert logprobs_BR.grad is not None and torch.equal(logprobs_BR.grad.float(), expected_BR)


def test_every_step_has_its_texts(tmp_path: Path) -> None:
    """Those of a step are the same whenever it is asked for and whoever asks; five steps of eight take 20 texts twice."""

    def ids(step: int, world: int) -> list[tuple[int, ...]]:
        hands = [mix_of(tmp_path, rank, world, 1).batches(step)[0] for rank in range(world)]
        return sorted(tuple(row.ids.tolist()) for hand in hands for batch in hand for row in batch)

    assert ids(3, 1) == ids(3, 2) == ids(3, 4) != ids(4, 1)
    taken = Counter(row for step in range(5) for row in ids(step, 1))
    assert taken == Counter({tuple(row.ids.tolist()): 2 for row in texts(20)})
