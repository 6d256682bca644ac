"""Log-probs and entropy of next tokens, from logits.

Shape legend: B rows, S sequence positions, T response tokens, V vocabulary.
Logits may be of any floating type; the arithmetic and the results are float32 (float64 for float64 logits).
No float32 copy of all logits is made: positions are worked through in chunks, and the backward pass holds the logits
and their gradient, nothing else of that size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

CHUNK_ELEMENTS = 2**22
"""Logits taken at a time (16 MiB as float32)."""


def token_logprobs(logits_BSV: torch.Tensor, ids_BS: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Log-probs of the tokens that follow: [B, S-1], entry t = log softmax(logits[t] / temperature)[ids[t+1]].

    Rows are right-padded; entries at and behind a row's last token are meaningless and for the caller to mask.
    Differentiable with respect to the logits.

    >>> token_logprobs(torch.zeros(1, 3, 4), torch.tensor([[0, 1, 2]]))
    tensor([[-1.3863, -1.3863]])
    """
    # The last position predicts nothing known. It is computed against token 0 and dropped, because slicing the logits
    # first would make autograd keep a second tensor of their size.
    following_BS = torch.cat([ids_BS[:, 1:], torch.zeros_like(ids_BS[:, :1])], dim=1)
    return label_logprobs(logits_BSV, following_BS, temperature)[:, :-1]


def label_logprobs(logits_BSV: torch.Tensor, labels_BS: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """[B, S]: log softmax(logits / temperature)[labels], with no shift: labels[t] is judged by logits[t].

    >>> label_logprobs(torch.tensor([[[0.0, 3.0]]]).log1p(), torch.tensor([[1]])).exp()
    tensor([[0.8000]])
    """
    if logits_BSV.shape[:2] != labels_BS.shape:
        raise ValueError(f"logits {tuple(logits_BSV.shape)} and labels {tuple(labels_BS.shape)} differ in rows or positions")
    result: torch.Tensor = _LabelLogprobs.apply(logits_BSV, labels_BS, temperature)  # type: ignore[no-untyped-call]
    return result


def entropy(logits_BSV: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """[B, S]: -sum_v p_v log p_v with p = softmax(logits / temperature), in nats. Differentiable with respect to the logits.

    >>> entropy(torch.zeros(1, 1, 4))
    tensor([[1.3863]])
    """
    result: torch.Tensor = _Entropy.apply(logits_BSV, temperature)  # type: ignore[no-untyped-call]
    return result


def gather_response(x_BS: torch.Tensor, prompt_lengths_B: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """[B, T]: what belongs to each response token, out of a tensor over positions of the sequence.

    Entry t reads x[prompt_length - 1 + t]: the position whose output predicts response token t. So log-probs [B, S-1],
    entropies [B, S] and values before each token [B, S] are gathered alike. 0 where mask_BT is False.

    >>> x = torch.tensor([[10.0, 11.0, 12.0, 13.0]])
    >>> gather_response(x, torch.tensor([2]), torch.tensor([[True, True, False]]))
    tensor([[11., 12.,  0.]])
    """
    offsets_T = torch.arange(mask_BT.shape[1], device=x_BS.device)
    index_BT = (prompt_lengths_B[:, None] - 1 + offsets_T).clamp(max=x_BS.shape[1] - 1)
    return torch.where(mask_BT, x_BS.gather(1, index_BT), torch.zeros((), dtype=x_BS.dtype, device=x_BS.device))


def _scaled(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide if temperature == 1.0 else wide / temperature


def _log_softmax(scaled: torch.Tensor) -> torch.Tensor:
    # The floor keeps a token of probability 0 (logit -inf) from making 0 * -inf = NaN; exp of it is 0 all the same.
    return scaled.log_softmax(-1).clamp_(min=-1e4)


def _chunks(logits_BSV: torch.Tensor) -> Iterator[slice]:
    rows, positions, vocabulary = logits_BSV.shape
    step = max(1, CHUNK_ELEMENTS // max(1, rows * vocabulary))
    return (slice(start, min(start + step, positions)) for start in range(0, max(1, positions), step))  # one empty slice of no positions


class _LabelLogprobs(torch.autograd.Function):
    """d logp / d logits = (onehot(label) - softmax(logits / temperature)) / temperature, recomputed chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, logits_BSV: torch.Tensor, labels_BS: torch.Tensor, temperature: float) -> torch.Tensor:
        ctx.save_for_backward(logits_BSV, labels_BS)
        ctx.temperature = temperature
        parts = []
        for part in _chunks(logits_BSV):
            scaled = _scaled(logits_BSV[:, part], temperature)
            chosen = scaled.gather(-1, labels_BS[:, part, None]).squeeze(-1)
            parts.append(chosen - scaled.logsumexp(-1))
        return torch.cat(parts, dim=1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_BS: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        logits_BSV, labels_BS = ctx.saved_tensors
        grad_logits_BSV = torch.empty_like(logits_BSV)
        for part in _chunks(logits_BSV):
            outer = grad_BS[:, part, None] / ctx.temperature
            grad = _scaled(logits_BSV[:, part], ctx.temperature).softmax(-1).mul_(-outer)
            grad.scatter_add_(-1, labels_BS[:, part, None], outer)
            grad_logits_BSV[:, part] = grad
        return grad_logits_BSV, None, None


class _Entropy(torch.autograd.Function):
    """d H / d logits = -p * (log p + H) / temperature, recomputed chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, logits_BSV: torch.Tensor, temperature: float) -> torch.Tensor:
        parts = []
        for part in _chunks(logits_BSV):
            logprobs = _log_softmax(_scaled(logits_BSV[:, part], temperature))
            parts.append(-torch.linalg.vecdot(logprobs.exp(), logprobs))
        entropy_BS = torch.cat(parts, dim=1)
        ctx.save_for_backward(logits_BSV, entropy_BS)
        ctx.temperature = temperature
        return entropy_BS

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_BS: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits_BSV, entropy_BS = ctx.saved_tensors
        grad_logits_BSV = torch.empty_like(logits_BSV)
        for part in _chunks(logits_BSV):
            logprobs = _log_softmax(_scaled(logits_BSV[:, part], ctx.temperature))
            outer = grad_BS[:, part, None] / ctx.temperature
            grad_logits_BSV[:, part] = -outer * logprobs.exp() * (logprobs + entropy_BS[:, part, None])
        return grad_logits_BSV, None
