"""Group relative policy optimisation: a response is as good as it is better than others to the same prompt. No critic.

Shape legend: B rows, T response tokens.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from app.algorithms.algorithm import Algorithm, KlPlace, groups_of, sequence_rewards
from app.experience import Experience
from app.numerics.groups import centred, standardised
from app.schema import Config


class GrpoOptions(Config):
    """Advantages relative to the group of samples of a prompt (Shao et al. 2024)."""

    divide_by_std: bool = True
    """Divide by the group's standard deviation; false leaves (score - group mean), which gives no prompt more weight than its scores
    do (Liu et al. 2025, https://arxiv.org/abs/2503.20783)."""
    mean_over: Literal["sequences", "tokens"] = "sequences"
    """What the loss averages: each sequence's mean over its tokens, or all tokens alike (Yu et al. 2025)."""


class Grpo(Algorithm[GrpoOptions]):
    """GRPO of Shao et al. 2024, https://arxiv.org/abs/2402.03300: A = (R - mean of the group) / (its deviation + 1e-4) on every token.

    R is the sum of a response's rewards: its score, as the KL penalty stands in the loss unless ppo.kl.place says otherwise.
    """

    options = GrpoOptions
    usual_kl_place: ClassVar[KlPlace] = "loss"

    @property
    def compares_samples(self) -> bool:
        return True

    @property
    def token_sums(self) -> bool:
        return self.config.mean_over == "tokens"

    def advantages(self, experience: Experience, rewards_BT: torch.Tensor) -> torch.Tensor:
        """One number per response, [B, T]; 0 where a failed score left it alone in its group. Raises ValueError without groups."""
        mask_BT = experience.mask_BT
        compare = standardised if self.config.divide_by_std else centred
        advantages_B = compare(sequence_rewards(rewards_BT, mask_BT), groups_of(experience), mask_BT.any(dim=1))
        return advantages_B[:, None].expand_as(rewards_BT)
