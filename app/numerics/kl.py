"""Estimates of KL(p || q) from tokens sampled by p. Source: Schulman 2020, http://joschu.net/blog/kl-approx.html.

Shapes: all tensors alike, one entry per token; results are per token and for the caller to mask.
"""

from __future__ import annotations

import torch


def k1(logprobs_p: torch.Tensor, logprobs_q: torch.Tensor) -> torch.Tensor:
    """log p - log q: unbiased, of either sign. Its sum over a sequence estimates the KL of whole responses.

    >>> k1(torch.tensor([-1.0]), torch.tensor([-1.5]))
    tensor([0.5000])
    """
    return logprobs_p - logprobs_q


def k3(logprobs_p: torch.Tensor, logprobs_q: torch.Tensor) -> torch.Tensor:
    """q/p - 1 - log(q/p): unbiased, never negative, of lower variance than k1 when p and q are close.

    >>> k3(torch.tensor([-1.0]), torch.tensor([-1.5]))  # exp(-0.5) - 1 + 0.5
    tensor([0.1065])
    """
    log_ratio = logprobs_q - logprobs_p
    return torch.expm1(log_ratio) - log_ratio
