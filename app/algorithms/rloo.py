"""REINFORCE with a leave-one-out baseline: the other samples of a prompt tell what to expect. No critic.

Shape legend: B rows, T response tokens.
"""

from __future__ import annotations

import torch

from app.algorithms.algorithm import Algorithm, groups_of, sequence_rewards
from app.experience import Experience
from app.numerics.groups import leave_one_out
from app.schema import Config


class RlooOptions(Config):
    """Each sample against the mean of the others (Ahmadian et al. 2024); nothing to set."""


class Rloo(Algorithm[RlooOptions]):
    """RLOO of Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740: A = R - mean of the other samples' R, on every token.

    R is the sum of a response's rewards: score - kl_coef * summed k1. At the first optimizer step of a batch, where every ratio
    is 1, the gradient is theirs, sum_t A grad log p, divided by the step's tokens; later steps are held by the clip.
    """

    options = RlooOptions

    @property
    def compares_samples(self) -> bool:
        return True

    def advantages(self, experience: Experience, rewards_BT: torch.Tensor) -> torch.Tensor:
        """One number per response, [B, T]; 0 where a failed score left it alone in its group. Raises ValueError without groups."""
        mask_BT = experience.mask_BT
        advantages_B = leave_one_out(sequence_rewards(rewards_BT, mask_BT), groups_of(experience), mask_BT.any(dim=1))
        return advantages_B[:, None].expand_as(rewards_BT)
