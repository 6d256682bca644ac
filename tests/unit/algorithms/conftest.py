"""A policy and a critic small enough to differentiate exactly, and batches of rollouts sampled for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from app.algorithms.ppo import Ppo
from app.experience import Experience, FinishReason, Loss, Minibatch, PolicyOutputs, Prompt, Rollout, TokenBatch, Totals
from app.numerics import entropy, gather_response, token_logprobs

VOCABULARY = 13
PAD = 0


@dataclass(frozen=True)
class Models:
    """Next-token logits and values looked up by the current token: a bigram policy [V, V] and critic [V]. float64 for tight bounds."""

    policy_VV: torch.Tensor
    critic_V: torch.Tensor

    @classmethod
    def random(cls, seed: int) -> Models:
        generator = torch.Generator().manual_seed(seed)
        shape = (VOCABULARY, VOCABULARY)
        return cls(
            torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_(),
            torch.randn(VOCABULARY, generator=generator, dtype=torch.float64).requires_grad_(),
        )

    def moved(self, seed: int, size: float) -> Models:
        """The same models after a random step."""
        other = Models.random(seed)
        return Models(
            (self.policy_VV + size * other.policy_VV).detach().requires_grad_(),
            (self.critic_V + size * other.critic_V).detach().requires_grad_(),
        )

    def outputs(self, tokens: TokenBatch) -> PolicyOutputs:
        logits_BSV = self.policy_VV[tokens.ids_BS]

        def response(x_BS: torch.Tensor) -> torch.Tensor:
            return gather_response(x_BS, tokens.prompt_lengths_B, tokens.mask_BT)

        return PolicyOutputs(
            logprobs_BT=response(token_logprobs(logits_BSV, tokens.ids_BS)),
            values_BT=response(self.critic_V[tokens.ids_BS]),
            entropy_BT=response(entropy(logits_BSV)),
        )

    def gradients(self, loss: Loss) -> tuple[torch.Tensor, torch.Tensor]:
        assert loss.value is not None
        policy, critic = torch.autograd.grad(loss.policy + loss.value, (self.policy_VV, self.critic_V))
        return policy, critic


def sample_experience(seed: int, rows: int = 8, padding: int = 0) -> Experience:
    """Prompts of 1 to 4 tokens, responses of 1 to 7; log-probs and values of models near each other; `padding` more columns."""
    draw = np.random.default_rng(seed)
    rollouts = [
        Rollout(
            prompt=Prompt(str(row), "", draw.integers(1, VOCABULARY, draw.integers(1, 5)).astype(np.int32)),
            sample=0,
            ids=draw.integers(1, VOCABULARY, draw.integers(1, 8)).astype(np.int32),
            logprobs=np.zeros(0, dtype=np.float32),
            finish=FinishReason.STOP,
            versions=np.zeros(0, dtype=np.int32),
        )
        for row in range(rows)
    ]
    tokens = TokenBatch.from_rollouts(rollouts, pad_id=PAD)
    tokens = replace(
        tokens,
        ids_BS=torch.nn.functional.pad(tokens.ids_BS, (0, padding), value=PAD),
        attention_BS=torch.nn.functional.pad(tokens.attention_BS, (0, padding)),
        mask_BT=torch.nn.functional.pad(tokens.mask_BT, (0, padding)),
    )
    proximal = Models.random(seed + 1)
    with torch.no_grad():
        before = proximal.outputs(tokens)
        behaviour = proximal.moved(seed + 2, 0.2).outputs(tokens)
        reference = proximal.moved(seed + 3, 0.3).outputs(tokens)
    assert before.values_BT is not None
    return Experience(
        tokens=tokens,
        scores_B=torch.from_numpy(draw.normal(size=rows)),
        behaviour_BT=behaviour.logprobs_BT,
        proximal_BT=before.logprobs_BT,
        reference_BT=reference.logprobs_BT,
        values_BT=before.values_BT,
    )


def sum_of_losses(ppo: Ppo, models: Models, credited: Experience, parts: Sequence[Sequence[int]], max_lag: int = 0) -> Loss:
    """One optimizer step over `parts` (rows of each micro-batch), with the denominators of all of them."""
    totals = Totals(tokens=int(credited.mask_BT.sum()), sequences=len(credited.tokens))
    losses = []
    for part in parts:
        minibatch = Minibatch.from_rows(credited, torch.tensor(part))
        losses.append(ppo.loss(models.outputs(minibatch.tokens), minibatch, totals, max_lag=max_lag))
    return Loss(
        policy=torch.stack([loss.policy for loss in losses]).sum(),
        value=torch.stack([loss.value for loss in losses if loss.value is not None]).sum(),
        metrics={name: sum(loss.metrics[name] for loss in losses) for name in losses[0].metrics},
    )


@pytest.fixture
def experience_of() -> Callable[..., Experience]:
    return sample_experience


@pytest.fixture
def models_of() -> Callable[[int], Models]:
    """The models after a step away from those that `experience_of` took its proximal log-probs and old values from."""
    return lambda seed: Models.random(seed + 1).moved(seed + 4, 0.25)


@pytest.fixture
def proximal_models_of() -> Callable[[int], Models]:
    return lambda seed: Models.random(seed + 1)


@pytest.fixture
def step_of() -> Callable[..., Loss]:
    return sum_of_losses
