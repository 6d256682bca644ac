"""Dropout on what a layer's attention and MLP add to the residual stream, as Open-Assistant trains with.

Forward hooks do it: they see the mode of the module they are on, draw from torch's generator of its device, and leave no trace
in what is saved.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from app.errors import ModelError
from app.models.trainable import decoder_layers

ATTENTION = ("attention", "self_attn", "self_attention", "attn")
MLP = ("mlp", "feed_forward", "block_sparse_moe")
"""What the two parts of a layer are called: GPT-NeoX, Llama and its kin, Falcon, GPT-2 and GPT-J, Mixtral."""
OFF = "residual_dropout = 0"


def layer_probabilities(probability: float, layers: int, *, lima: bool) -> list[float]:
    """Of each layer, lowest first: `probability` everywhere, or rising linearly from 0 to it (LIMA, https://arxiv.org/abs/2305.11206)."""
    return [probability * i / max(1, layers - 1) if lima else probability for i in range(layers)]


def add_residual_dropout(model: PreTrainedModel, probability: float, *, lima: bool = False) -> None:
    """Drop elements of attention and MLP outputs, in place and in training mode alone; what is kept is scaled by 1 / (1 - p).

    Raises ModelError for a model whose layers, or whose attention and MLP in them, cannot be found.
    """
    if not probability:
        return
    layers = decoder_layers(model, OFF)
    for layer, p in zip(layers, layer_probabilities(probability, len(layers), lima=lima), strict=True):
        for names in (ATTENTION, MLP):
            part = _part(layer, names)
            if p:
                part.register_forward_hook(_dropout(p))


def _part(layer: nn.Module, names: tuple[str, ...]) -> nn.Module:
    part = next((child for name, child in layer.named_children() if name in names), None)
    if part is None:
        raise ModelError(f"{type(layer).__name__} has no part called {' or '.join(names)}; set {OFF}")
    if "residual" in inspect.signature(part.forward).parameters:  # Bloom: its output is the stream itself
        raise ModelError(f"{type(layer).__name__} adds the residual stream inside {type(part).__name__}; set {OFF}")
    return part


def _dropout(probability: float) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        if not module.training:
            return output
        added, *rest = output if isinstance(output, tuple) else (output,)
        dropped = nn.functional.dropout(added, probability)
        return (dropped, *rest) if isinstance(output, tuple) else dropped

    return hook
