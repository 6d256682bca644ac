"""Low-rank adapters by the names of their weights, without the model that they sit in: W = W0 + scale * B A.

What is `X.weight` [O, I] in a model without adapters is, in peft's names, `X.base_layer.weight` [O, I], `X.lora_A.default.weight` [R, I]
and `X.lora_B.default.weight` [O, R]. Source: Hu et al., 2021, https://arxiv.org/abs/2106.09685.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from app.config.shared import AdapterConfig
from app.errors import ModelError

ADAPTER = "default"
"""The name that peft gives an adapter."""
BASE, LOW, HIGH = ".base_layer.weight", f".lora_A.{ADAPTER}.weight", f".lora_B.{ADAPTER}.weight"


def scale_of(config: AdapterConfig) -> float:
    """What the product B A is multiplied by."""
    return config.alpha / config.rank


def is_adapter(name: str) -> bool:
    """Whether a weight is one of an adapter's two matrices."""
    return name.endswith((LOW, HIGH))


def merged_weights(weights: Iterable[tuple[str, torch.Tensor]], scale: float) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of a model with adapters as those of one without: under its names, each adapter added to what it stands beside.

    They come in any order: what has an adapter waits until all three parts are there, everything else is handed on at once. Sums are
    taken in float32 and have the base's dtype. Raises ModelError at the end where parts are missing.
    """
    waiting: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in weights:
        suffix = next((suffix for suffix in (BASE, LOW, HIGH) if name.endswith(suffix)), None)
        if suffix is None:
            yield name.replace(".base_layer.", "."), tensor  # a bias
            continue
        owner = name.removesuffix(suffix)
        parts = waiting.setdefault(owner, {})
        parts[suffix] = tensor
        if len(parts) == 3:
            del waiting[owner]
            delta = scale * (parts[HIGH].float() @ parts[LOW].float())
            yield f"{owner}.weight", (parts[BASE].float() + delta).to(parts[BASE].dtype)
    for owner, parts in waiting.items():
        missing = [suffix for suffix in (BASE, LOW, HIGH) if suffix not in parts]
        raise ModelError(f"{owner}: its adapter lacks {', '.join(missing)}; give all weights of the model")
