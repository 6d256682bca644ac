"""Estimates of KL(p || q) from tokens sampled by p, and the controller of a KL penalty's weight.

Source: Schulman 2020, http://joschu.net/blog/kl-approx.html. Shapes: all tensors alike, one entry per token; results are per
token and for the caller to mask.

As *rewards* and metrics only values count: k1 and k3 both have the KL as their mean. As *losses* only gradients count, and they
differ. With tokens drawn from p and p the policy under training:

    k1: grad log p                      mean 0: no penalty at all, so it is no loss here
    k2: (log p - log q) grad log p      mean = gradient of KL(p || q), the one that k1 in the reward descends
    k3: (1 - q/p) grad log p            mean = gradient of KL(q || p), which agrees with that of KL(p || q) near p = q

Tokens drawn from another policy need the weight p / behaviour on each token, without gradient, for these means to hold.
"""

from __future__ import annotations

import torch


def k1(logprobs_p: torch.Tensor, logprobs_q: torch.Tensor) -> torch.Tensor:
    """log p - log q: unbiased, of either sign. Its sum over a sequence estimates the KL of whole responses.

    >>> k1(torch.tensor([-1.0]), torch.tensor([-1.5]))
    tensor([0.5000])
    """
    return logprobs_p - logprobs_q


def k2(logprobs_p: torch.Tensor, logprobs_q: torch.Tensor) -> torch.Tensor:
    """(log p - log q)^2 / 2: biased as a value, never negative; as a loss its gradient is that of KL(p || q).

    >>> k2(torch.tensor([-1.0]), torch.tensor([-1.5]))
    tensor([0.1250])
    """
    return 0.5 * (logprobs_p - logprobs_q) ** 2


def k3(logprobs_p: torch.Tensor, logprobs_q: torch.Tensor) -> torch.Tensor:
    """q/p - 1 - log(q/p): unbiased, never negative, of lower variance than k1 when p and q are close.

    >>> k3(torch.tensor([-1.0]), torch.tensor([-1.5]))  # exp(-0.5) - 1 + 0.5
    tensor([0.1065])
    """
    log_ratio = logprobs_q - logprobs_p
    return torch.expm1(log_ratio) - log_ratio


def adapted_coefficient(coef: float, kl: float, *, target: float, horizon: float, sequences: int) -> float:
    """coef * (1 + clip(kl / target - 1, -0.2, 0.2) * sequences / horizon): the next weight of a KL penalty.

    kl: mean over sequences of the k1 summed over their tokens, nats; sequences: how many were seen since the last change.
    Source: Ziegler et al. 2019, https://arxiv.org/abs/1909.08593, section 2.2.

    >>> adapted_coefficient(0.1, 9.0, target=6.0, horizon=10_000, sequences=500)  # error 0.5 is cut to 0.2
    0.101
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coef * (1 + error * sequences / horizon)
