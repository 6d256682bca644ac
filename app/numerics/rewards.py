"""From reward-model scores to a reward per token.

Shape legend: B rows, T response tokens. mask_BT is bool, True on response tokens.
"""

from __future__ import annotations

import torch

from app.numerics.kl import k1


def shape_scores(scores_B: torch.Tensor, finished_B: torch.Tensor, *, clip: float | None, missing_eos_score: float | None) -> torch.Tensor:
    """Scores [B] after clipping to [-clip, clip] and then, where finished_B is False, replacing by missing_eos_score.

    A replaced score is never above the row's own clipped score, so that running into the token limit cannot pay.
    None turns a step off; NaN (a failed score) stays NaN. finished_B: bool, True where the end token was sampled.
    Source: missing-EOS rule of Huang et al. 2024, https://arxiv.org/abs/2403.17031, with the bound added.

    >>> scores, finished = torch.tensor([9.0, 9.0, -3.0]), torch.tensor([True, False, False])
    >>> shape_scores(scores, finished, clip=4.0, missing_eos_score=-1.0)
    tensor([ 4., -1., -3.])
    """
    shaped_B = scores_B if clip is None else scores_B.clamp(-clip, clip)
    if missing_eos_score is None:
        return shaped_B
    return torch.where(finished_B, shaped_B, shaped_B.clamp(max=missing_eos_score))


def token_rewards(
    scores_B: torch.Tensor, logprobs_BT: torch.Tensor, reference_BT: torch.Tensor, mask_BT: torch.Tensor, *, kl_coef: float
) -> torch.Tensor:
    """Rewards [B, T]: -kl_coef * (log p - log p_reference) on every response token, plus the score at the last one.

    The last response token is the end token where one was sampled. 0 where masked; the score of a row without any
    response token is not read.
    Source: Ziegler et al. 2019, https://arxiv.org/abs/1909.08593, equation 2.

    >>> mask = torch.tensor([[True, True, False]])
    >>> token_rewards(torch.tensor([2.0]), torch.full((1, 3), -1.0), torch.full((1, 3), -1.5), mask, kl_coef=0.1)
    tensor([[-0.0500,  1.9500,  0.0000]])
    """
    penalty_BT = kl_coef * k1(logprobs_BT, reference_BT)
    score_BT = torch.where(last_true(mask_BT), scores_B[:, None], 0.0)
    return torch.where(mask_BT, score_BT - penalty_BT, 0.0)


def last_true(mask_BT: torch.Tensor) -> torch.Tensor:
    """Bool [B, T], True at the last True of each row only (nowhere in a row without any).

    >>> last_true(torch.tensor([[True, True, False], [False, False, False]]))
    tensor([[False,  True, False],
            [False, False, False]])
    """
    behind_BT = mask_BT.long().flip(1).cumsum(1).flip(1)
    return mask_BT & (behind_BT == 1)
