"""Generalised advantage estimation over response tokens.

Shape legend: B rows, T response tokens. mask_BT is bool, True on tokens that the policy chose.
"""

from __future__ import annotations

import torch


def generalized_advantages(
    rewards_BT: torch.Tensor, values_BT: torch.Tensor, mask_BT: torch.Tensor, *, gamma: float, lam: float
) -> torch.Tensor:
    """GAE, [B, T], 0 where masked:

        delta_t = r_t + gamma * V_{t+1} - V_t
        A_t     = delta_t + gamma * lam * A_{t+1}

    `t + 1` is the next *unmasked* token of the row; behind the last one value and advantage are 0 (the response has
    ended). values_BT[:, t] is the critic's value of the state before token t. Masked entries of the inputs are not read.
    Source: Schulman et al. 2016, https://arxiv.org/abs/1506.02438, equations 11 to 16.

    >>> rewards, values = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.25]])
    >>> generalized_advantages(rewards, values, torch.ones(1, 2, dtype=torch.bool), gamma=1.0, lam=0.5)
    tensor([[0.1250, 0.7500]])
    """
    advantages_BT = torch.zeros_like(values_BT)
    next_value_B = torch.zeros_like(values_BT[:, 0])
    next_advantage_B = torch.zeros_like(next_value_B)
    for t in reversed(range(values_BT.shape[1])):
        delta_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        advantage_B = delta_B + gamma * lam * next_advantage_B
        # A masked position hands on what lies behind it unchanged, so padding and gaps cannot leak in at any lambda.
        next_value_B = torch.where(mask_BT[:, t], values_BT[:, t], next_value_B)
        next_advantage_B = torch.where(mask_BT[:, t], advantage_B, next_advantage_B)
        advantages_BT[:, t] = torch.where(mask_BT[:, t], advantage_B, 0.0)
    return advantages_BT
