"""What a learner makes of rollouts, with scores that differ."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from app.experience import Experience, Rollout, TokenBatch, pad_rows
from app.interfaces import Learner


def experience_of(rollouts: Sequence[Rollout], learner: Learner) -> Experience:
    """Not yet credited; the policy itself is the reference."""
    tokens = TokenBatch.from_rollouts(rollouts, pad_id=0)
    proximal_BT, values_BT = learner.inspect(tokens)
    behaviour_BT = pad_rows([rollout.logprobs for rollout in rollouts], tokens.mask_BT.shape[1])
    scores_B = torch.linspace(-1, 1, len(rollouts))
    return Experience(tokens, scores_B, behaviour_BT, proximal_BT, proximal_BT, values_BT)
