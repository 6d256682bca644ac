"""Operations that a transformer needs, and the rate at which this machine multiplies matrices of its shapes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

GEMM_TOKENS = 2048
GEMM_REPEATS = 5
FORWARD_FORMULA = "2 x (matrix weights of the trunk x tokens + head weights x targets) + 2 x layers x hidden x sum of squared lengths"


@dataclass(frozen=True)
class Shape:
    """Sizes of a model that its work follows from. trunk: weights of its linear layers; head: hidden x vocabulary; products: (in, out)
    of its linear layers, each once."""

    trunk: int
    head: int
    layers: int
    attention: int
    products: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, model: Any) -> Shape:
        config = model.config.get_text_config()
        linear = [part for part in model.base_model.modules() if isinstance(part, torch.nn.Linear)]
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            sum(part.weight.numel() for part in linear),
            model.get_output_embeddings().weight.numel(),
            config.num_hidden_layers,
            config.num_attention_heads * width,
            tuple(sorted({(part.in_features, part.out_features) for part in linear})),
        )

    def forward(self, lengths: Sequence[int], targets: int) -> float:
        """FLOP of one forward pass over sequences of so many tokens, by FORWARD_FORMULA: causal attention sees half of its square.
        targets: positions at which the vocabulary's head is needed. A backward pass is twice that."""
        squares = sum(length**2 for length in lengths)
        return 2.0 * (self.trunk * sum(lengths) + self.head * targets) + 2.0 * self.layers * self.attention * squares


def matrix_rate(shape: Shape) -> float:
    """FLOP/s of float32 products of the model's own shapes (forward, and both of the backward pass), weighted as a layer has them."""
    flop = seconds = 0.0
    for wide, out in shape.products:
        x, w, g = torch.randn(GEMM_TOKENS, wide), torch.randn(out, wide), torch.randn(GEMM_TOKENS, out)
        for product in (partial(torch.mm, x, w.t()), partial(torch.mm, g, w), partial(torch.mm, g.t(), x)):
            product()
            seconds += min(timed(product) for _ in range(GEMM_REPEATS))
            flop += 2.0 * GEMM_TOKENS * wide * out
    return flop / seconds


def timed(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
