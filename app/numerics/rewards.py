"""From reward-model scores to a reward per token, in this order:

    score (the reward model's logit - its offset) -> minus the score of the reference answer -> divided by a scale -> clipped
    -> missing-EOS term -> length terms -> added at the last response token; -kl_coef * k1 on every response token.

Shape legend: B rows, T response tokens. mask_BT is bool, True on response tokens. A failed score is NaN and stays NaN throughout.
"""

from __future__ import annotations

import torch

from app.numerics.kl import k1


def above_baseline(scores_B: torch.Tensor, baselines_B: torch.Tensor, has_baseline_B: torch.Tensor) -> torch.Tensor:
    """scores_B minus baselines_B where has_baseline_B (bool) is True, scores_B elsewhere; [B].

    >>> above_baseline(torch.tensor([2.0, 2.0]), torch.tensor([0.5, 9.0]), torch.tensor([True, False]))
    tensor([1.5000, 2.0000])
    """
    return torch.where(has_baseline_B, scores_B - baselines_B, scores_B)


def clip_scores(scores_B: torch.Tensor, clip: float | None) -> torch.Tensor:
    """Scores [B] cut to [-clip, clip]; None leaves them.

    >>> clip_scores(torch.tensor([9.0, -0.5]), 4.0)
    tensor([ 4.0000, -0.5000])
    """
    return scores_B if clip is None else scores_B.clamp(-clip, clip)


def penalise_missing_eos(
    scores_B: torch.Tensor, finished_B: torch.Tensor, *, replacement: float | None, penalty: float = 0.0
) -> torch.Tensor:
    """Scores [B], where finished_B is False replaced by `replacement` (None: kept) and lowered by `penalty`.

    A replaced score is never above the row's own score, so that running into the token limit cannot pay.
    finished_B: bool, True where the end token was sampled.
    Source: missing-EOS rule of Huang et al. 2024, https://arxiv.org/abs/2403.17031, with the bound added.

    >>> penalise_missing_eos(torch.tensor([4.0, 4.0, -3.0]), torch.tensor([True, False, False]), replacement=-1.0)
    tensor([ 4., -1., -3.])
    """
    bounded_B = scores_B if replacement is None else scores_B.clamp(max=replacement)
    return torch.where(finished_B, scores_B, bounded_B - penalty)


def length_penalties(
    lengths_B: torch.Tensor, *, per_token: float, overlong_buffer: int | None, overlong_penalty: float, max_length: int
) -> torch.Tensor:
    """What responses of lengths_B tokens lose, float32 [B], never negative: per_token * length, plus the overlong term

        overlong_penalty * clip((length - (max_length - overlong_buffer)) / overlong_buffer, 0, 1)

    which rises over the last `overlong_buffer` tokens (None: no such term) before the token limit `max_length`.
    Source: soft overlong punishment of Yu et al. 2025, https://arxiv.org/abs/2503.14476, equation 13.

    >>> length_penalties(torch.tensor([4, 9, 10]), per_token=0.0, overlong_buffer=4, overlong_penalty=1.0, max_length=10)
    tensor([0.0000, 0.7500, 1.0000])
    """
    penalties_B = per_token * lengths_B.float()
    if overlong_buffer is not None:
        over_B = (lengths_B - (max_length - overlong_buffer)) / overlong_buffer
        penalties_B = penalties_B + overlong_penalty * over_B.clamp(0, 1)
    return penalties_B


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
