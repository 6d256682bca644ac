"""A policy and a critic small enough to differentiate exactly, batches of rollouts for them, and every algorithm in several settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from app.algorithms.algorithm import Algorithm
from app.algorithms.grpo import Grpo, GrpoOptions
from app.algorithms.ppo import Ppo, PpoOptions
from app.algorithms.reinforce_pp import ReinforcePp, ReinforcePpOptions
from app.algorithms.rloo import Rloo, RlooOptions
from app.algorithms.surrogate import Surrogate, SurrogateConfig
from app.experience import Experience, FinishReason, Loss, Minibatch, PolicyOutputs, Prompt, Rollout, TokenBatch, Totals
from app.numerics import entropy, gather_response, token_logprobs

VOCABULARY = 13
PAD = 0
ROWS = 8
GROUPS = (0, 2, 0, 1, 2, 1, 0, 2)
"""Which of the rows belong together: groups of three, two and three that stand mixed up."""

FULL_LOSS = Surrogate(SurrogateConfig(clip_high=0.28, dual_clip=3.0, entropy_coef=0.02), kl_in_reward=False, kl_in_loss="k2")
K3_LOSS = Surrogate(kl_in_reward=False, kl_in_loss="k3")
ALGORITHM_CASES: dict[str, Algorithm[Any]] = {
    "ppo-0.9": Ppo(PpoOptions(lam=0.9)),
    "ppo-0.95": Ppo(PpoOptions(lam=0.95)),
    "ppo-1": Ppo(PpoOptions(lam=1.0, value_clip=None)),
    "ppo-full-loss": Ppo(PpoOptions(lam=0.95, gamma=0.97, whiten_advantages=False), FULL_LOSS),
    "grpo": Grpo(GrpoOptions(), K3_LOSS),
    "grpo-full-loss": Grpo(GrpoOptions(), FULL_LOSS),
    "grpo-tokens": Grpo(GrpoOptions(divide_by_std=False, mean_over="tokens"), Surrogate()),
    "rloo": Rloo(RlooOptions()),
    "reinforce_pp-0.9": ReinforcePp(ReinforcePpOptions(gamma=0.9)),
    "reinforce_pp-0.95": ReinforcePp(ReinforcePpOptions(gamma=0.95, group_baseline=True), K3_LOSS),
    "reinforce_pp-1": ReinforcePp(ReinforcePpOptions()),
}
"""PPO at several lambda, the others at several discounts or with another form of the loss."""


def lagging(algorithm: Algorithm[Any], max_lag: int) -> Algorithm[Any]:
    return replace(algorithm, surrogate=replace(algorithm.surrogate, max_lag=max_lag))


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

    @classmethod
    def before(cls, seed: int) -> Models:
        """Those that `sample_experience` took its proximal log-probs and old values from."""
        return cls.random(seed + 1)

    @classmethod
    def after(cls, seed: int) -> Models:
        """The same after a step, as in the second epoch of an update."""
        return cls.before(seed).moved(seed + 4, 0.25)

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
        """Of policy and critic; zeros for a critic that the loss does not read."""
        total = loss.policy if loss.value is None else loss.policy + loss.value
        policy, critic = torch.autograd.grad(total, (self.policy_VV, self.critic_V), allow_unused=True)
        return policy, torch.zeros_like(self.critic_V) if critic is None else critic


def sample_experience(seed: int, algorithm: Algorithm[Any] | None = None, padding: int = 0) -> Experience:
    """Prompts of 1 to 4 tokens, responses of 1 to 7; log-probs and values of models near each other; `padding` more columns.
    Without a critic in `algorithm` there are no values."""
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
        for row in range(ROWS)
    ]
    tokens = TokenBatch.from_rollouts(rollouts, pad_id=PAD)
    tokens = replace(
        tokens,
        ids_BS=torch.nn.functional.pad(tokens.ids_BS, (0, padding), value=PAD),
        attention_BS=torch.nn.functional.pad(tokens.attention_BS, (0, padding)),
        mask_BT=torch.nn.functional.pad(tokens.mask_BT, (0, padding)),
    )
    proximal = Models.before(seed)
    with torch.no_grad():
        before = proximal.outputs(tokens)
        behaviour = proximal.moved(seed + 2, 0.2).outputs(tokens)
        reference = proximal.moved(seed + 3, 0.3).outputs(tokens)
    return Experience(
        tokens=tokens,
        scores_B=torch.from_numpy(draw.normal(size=ROWS)),
        behaviour_BT=behaviour.logprobs_BT,
        proximal_BT=before.logprobs_BT,
        reference_BT=reference.logprobs_BT,
        values_BT=before.values_BT if algorithm is None or algorithm.has_critic else None,
        groups_B=torch.tensor(GROUPS),
    )


def sum_of_losses(algorithm: Algorithm[Any], models: Models, credited: Experience, parts: Sequence[Sequence[int]]) -> Loss:
    """One optimizer step over `parts` (rows of each micro-batch), with the denominators of all of them."""
    totals = Totals(tokens=int(credited.mask_BT.sum()), sequences=int(credited.mask_BT.any(1).sum()))
    losses = []
    for part in parts:
        minibatch = Minibatch.from_rows(credited, torch.tensor(part))
        losses.append(algorithm.loss(models.outputs(minibatch.tokens), minibatch, totals))
    values = [loss.value for loss in losses if loss.value is not None]
    return Loss(
        policy=torch.stack([loss.policy for loss in losses]).sum(),
        value=torch.stack(values).sum() if values else None,
        metrics={name: sum(loss.metrics[name] for loss in losses) for name in losses[0].metrics},
    )


def one_row(**changes: torch.Tensor | None) -> Experience:
    """A prompt of one token and a response of three, of which the log-probs, values and score make easy sums."""
    tokens = TokenBatch(
        ids_BS=torch.tensor([[5, 6, 7, 8]]),
        attention_BS=torch.ones(1, 4, dtype=torch.bool),
        prompt_lengths_B=torch.tensor([1]),
        response_lengths_B=torch.tensor([3]),
        mask_BT=torch.ones(1, 3, dtype=torch.bool),
    )
    experience = Experience(
        tokens=tokens,
        scores_B=torch.tensor([3.0]),
        behaviour_BT=torch.tensor([[-1.0, -2.0, -1.0]]),
        proximal_BT=torch.tensor([[-1.0, -2.0, -1.0]]),
        reference_BT=torch.tensor([[-1.5, -1.0, -3.0]]),
        values_BT=torch.tensor([[1.0, 0.5, 1.5]]),
    )
    return replace(experience, **changes)  # type: ignore[arg-type]
