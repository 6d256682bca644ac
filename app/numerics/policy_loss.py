"""Clipped policy and value losses of PPO.

Shape legend: B rows, T response tokens. mask_BT is bool, True on response tokens; masked entries are not read and get no
gradient. Every loss is a *sum* over the tokens given, divided by `total_tokens`, the response tokens of the whole
optimizer step over all micro-batches and ranks: adding the parts up gives the mean, however the step was split.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from app.numerics.masked import masked_sum, zero_masked


class ClippedLoss(NamedTuple):
    """A scalar loss with gradient, and the share of tokens on which a clip decides (no gradient)."""

    loss: torch.Tensor
    clip_fraction: torch.Tensor


def ratios(logprobs_BT: torch.Tensor, proximal_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """current / proximal = exp(log p - log p_proximal), [B, T]; 1 where masked.

    >>> ratios(torch.tensor([[-1.0, -9.0]]), torch.tensor([[-1.0, 0.0]]), torch.tensor([[True, False]]))
    tensor([[1., 1.]])
    """
    return zero_masked(logprobs_BT - proximal_BT, mask_BT).exp()


def truncated_importance(proximal_BT: torch.Tensor, behaviour_BT: torch.Tensor, mask_BT: torch.Tensor, *, maximum: float) -> torch.Tensor:
    """min(proximal / behaviour, maximum), [B, T], without gradient; 1 (or `maximum`, if smaller) where masked.

    Corrects for tokens that were sampled by an older policy than the one the ratio starts from, at bounded variance.
    Source: Espeholt et al. 2018, https://arxiv.org/abs/1802.01561; Hilton et al. 2022, https://arxiv.org/abs/2110.00641.

    >>> logprobs = torch.tensor([[0.5, 0.25]]).log()
    >>> truncated_importance(logprobs, torch.tensor([[0.1, 0.5]]).log(), torch.ones(1, 2, dtype=torch.bool), maximum=2.0)
    tensor([[2.0000, 0.5000]])
    """
    return ratios(proximal_BT, behaviour_BT, mask_BT).clamp(max=maximum).detach()


def sequence_weights(mask_BT: torch.Tensor, *, total_tokens: int, total_sequences: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """total_tokens / (total_sequences * tokens of the row), [B, T]; 0 where masked.

    A sum of losses over tokens that is divided by total_tokens becomes, with these weights, the mean over sequences of each
    sequence's mean over its tokens.

    >>> sequence_weights(torch.tensor([[True, True], [True, False]]), total_tokens=3, total_sequences=2)
    tensor([[0.7500, 0.7500],
            [1.5000, 0.0000]])
    """
    lengths_B1 = mask_BT.sum(1, keepdim=True, dtype=dtype).clamp(min=1)
    return mask_BT * (total_tokens / (max(1, total_sequences) * lengths_B1))


def clipped_policy_loss(
    logprobs_BT: torch.Tensor,
    proximal_BT: torch.Tensor,
    advantages_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    *,
    clip: float,
    total_tokens: int,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    weights_BT: torch.Tensor | None = None,
) -> ClippedLoss:
    """sum_t w_t * max(-A_t * rho_t, -A_t * clip(rho_t, 1 - clip, 1 + clip_high)) / total_tokens, rho = current / proximal.

    clip_high: None is the same as clip; a larger one lets unlikely tokens of positive advantage grow faster.
    dual_clip: where A_t < 0 a token's loss stays at -A_t * dual_clip however large rho gets; None leaves it unbounded.
    weights_BT multiplies each token's loss (see `truncated_importance`); None is 1 everywhere.
    Source: Schulman et al. 2017, https://arxiv.org/abs/1707.06347, equation 7, with the sign of a loss; two bounds: Yu et al. 2025,
    https://arxiv.org/abs/2503.14476; dual clip: Ye et al. 2020, https://arxiv.org/abs/1912.09729, equation 3.

    >>> current, proximal = torch.tensor([[1.5]]).log(), torch.tensor([[1.0]]).log()
    >>> mask = torch.tensor([[True]])
    >>> clipped_policy_loss(current, proximal, torch.tensor([[2.0]]), mask, clip=0.2, total_tokens=1)
    ClippedLoss(loss=tensor(-2.4000), clip_fraction=tensor(1.))
    """
    ratio_BT = ratios(logprobs_BT, proximal_BT, mask_BT)
    plain_BT = -advantages_BT * ratio_BT
    near_BT = -advantages_BT * ratio_BT.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))
    loss_BT = torch.maximum(plain_BT, near_BT)
    clipped_BT = near_BT > plain_BT
    if dual_clip is not None:
        bound_BT = torch.where(advantages_BT < 0, -advantages_BT * dual_clip, torch.inf)
        clipped_BT = clipped_BT | (loss_BT > bound_BT)
        loss_BT = torch.minimum(loss_BT, bound_BT)
    if weights_BT is not None:
        loss_BT = weights_BT * loss_BT
    return _sums(loss_BT, clipped_BT, mask_BT, total_tokens)


def clipped_value_loss(
    values_BT: torch.Tensor,
    old_values_BT: torch.Tensor,
    returns_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    *,
    clip: float | None,
    total_tokens: int,
) -> ClippedLoss:
    """sum_t 0.5 * max((V_t - R_t)^2, (clip(V_t, V_old_t - clip, V_old_t + clip) - R_t)^2) / total_tokens.

    None as `clip` leaves the plain squared error.
    Source: Huang et al. 2024, https://arxiv.org/abs/2403.17031 (value clipping as in OpenAI's ppo2).

    >>> tensors = torch.tensor([[2.0]]), torch.tensor([[0.0]]), torch.tensor([[3.0]]), torch.tensor([[True]])
    >>> clipped_value_loss(*tensors, clip=0.5, total_tokens=1)  # 0.5 * max(1, 2.5 ** 2)
    ClippedLoss(loss=tensor(3.1250), clip_fraction=tensor(1.))
    """
    # Masked before squaring: the gradient of a square multiplies by the error, and 0 * NaN is NaN.
    plain_BT = zero_masked(values_BT - returns_BT, mask_BT) ** 2
    if clip is None:
        return _sums(0.5 * plain_BT, torch.zeros_like(mask_BT), mask_BT, total_tokens)
    near_BT = torch.clamp(values_BT, old_values_BT - clip, old_values_BT + clip)
    clipped_BT = zero_masked(near_BT - returns_BT, mask_BT) ** 2
    return _sums(0.5 * torch.maximum(plain_BT, clipped_BT), clipped_BT > plain_BT, mask_BT, total_tokens)


def _sums(loss_BT: torch.Tensor, clipped_BT: torch.Tensor, mask_BT: torch.Tensor, total_tokens: int) -> ClippedLoss:
    share = masked_sum(clipped_BT.to(loss_BT.dtype), mask_BT) / total_tokens
    return ClippedLoss(loss=masked_sum(loss_BT, mask_BT) / total_tokens, clip_fraction=share)
