"""What every algorithm is: a way to credit a batch, and the losses that follow from it.

Shape legend: B rollouts, T response tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Generic, Literal, TypeVar

import torch

from app.algorithms.credit import check_finite, mask_failed_rows
from app.algorithms.surrogate import Surrogate
from app.experience import Experience, Loss, Minibatch, PolicyOutputs, Totals
from app.numerics.masked import zero_masked
from app.numerics.rewards import token_rewards
from app.schema import Config

C = TypeVar("C", bound=Config)
KlPlace = Literal["reward", "loss", "both"]


@dataclass(frozen=True)
class Algorithm(ABC, Generic[C]):
    """An algorithm with its options. Subclasses say how advantages come from rewards; only one with a critic has a value loss."""

    config: C
    surrogate: Surrogate = Surrogate()

    options: ClassVar[type[Config]]
    """The class of `config`; its fields are the keys `ppo.algorithm.NAME.*`."""
    has_critic: ClassVar[bool] = False
    """Whether the learner trains a critic, and `experience` holds its values."""
    usual_kl_place: ClassVar[KlPlace] = "reward"
    """Where the KL penalty stands unless ppo.kl.place says otherwise."""

    @property
    def compares_samples(self) -> bool:
        """Whether several samples of each prompt are needed."""
        return False

    @property
    def token_sums(self) -> bool:
        """Whether the loss is the mean over all tokens of a step, not of each sequence's own mean."""
        return True

    def credit(self, experience: Experience, *, kl_coef: float) -> Experience:
        """The batch with rewards, advantages and returns. Give it the *whole* batch, before it is split over ranks.

        In this order: rows whose score is NaN are masked out; rewards are the score at the last token and, where the penalty is
        part of the reward, -kl_coef * (proximal - reference) on every token; advantages; returns = advantage + old value (0
        without a critic); advantages are then normalised over the batch. scores_B are taken as they are (see
        app.algorithms.shaping). Totals of a step must be counted from the mask of what this returns. Raises NonFiniteError.
        """
        experience = mask_failed_rows(experience)
        check_finite(experience)
        mask_BT = experience.mask_BT
        rewards_BT = token_rewards(
            experience.scores_B,
            experience.proximal_BT,
            experience.reference_BT,
            mask_BT,
            kl_coef=kl_coef if self.surrogate.kl_in_reward else 0.0,
        )
        experience = replace(experience, rewards_BT=rewards_BT, kl_coef=kl_coef)
        advantages_BT = zero_masked(self.advantages(experience, rewards_BT), mask_BT)
        returns_BT = advantages_BT if experience.values_BT is None else advantages_BT + experience.values_BT
        return replace(experience, advantages_BT=self.normalised(advantages_BT, mask_BT), returns_BT=returns_BT)

    @abstractmethod
    def advantages(self, experience: Experience, rewards_BT: torch.Tensor) -> torch.Tensor:
        """Advantages [B, T] before normalisation; what is masked is set to 0 afterwards."""

    def normalised(self, advantages_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
        """The advantages that the policy loss reads, out of those of the whole batch."""
        return advantages_BT

    def loss(self, outputs: PolicyOutputs, minibatch: Minibatch, totals: Totals) -> Loss:
        """Losses and metrics of one micro-batch, each a sum over its tokens divided by the totals (see `Surrogate.loss`)."""
        policy, metrics = self.surrogate.loss(outputs, minibatch, totals, per_sequence=not self.token_sums)
        return Loss(policy=policy, value=None, metrics=as_floats(metrics))


def sequence_rewards(rewards_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Sum of the rewards of each response, [B]."""
    return zero_masked(rewards_BT, mask_BT).sum(dim=1)


def groups_of(experience: Experience) -> torch.Tensor:
    """groups_B. Raises ValueError for a batch without groups."""
    if experience.groups_B is None:
        raise ValueError("the algorithm compares samples of one prompt, and the experience has no groups_B: say which rows belong together")
    return experience.groups_B


def as_floats(metrics: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """One transfer from the accelerator instead of one per metric."""
    return dict(zip(metrics, torch.stack([x.float() for x in metrics.values()]).tolist(), strict=True))
