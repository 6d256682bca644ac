"""Work of a step, counted: FLOP of forward and backward passes, bytes of collectives and of Adam on the host.

FLOP are 2 per weight and token forward, twice that backward (Kaplan et al., 2020, https://arxiv.org/abs/2001.08361), plus causal attention.
"""

from __future__ import annotations

import math
from dataclasses import replace

from app.config.ppo import PpoConfig
from app.config.shared import DeepSpeedConfig, Trainable
from app.config.training import TrainingConfig
from app.planning.memory import MASTER, MOMENTS
from app.planning.shapes import ModelShape
from app.planning.trained import adapter_parameters, frozen_layers

FORWARD = 2
HOST_ADAM_BANDWIDTH = 10e9  # bytes/s of one process that runs Adam on the host


def flop(shape: ModelShape, tokens: float, length: float, *, targets: float = 0.0) -> float:
    """Of a forward pass over `tokens` in sequences of `length`, with the output head on `targets` of them."""
    weights = shape.layers * shape.layer * tokens + shape.embedding * targets
    attention = shape.layers * shape.queries * length * tokens
    return FORWARD * (weights + attention)


def decode_flop(shape: ModelShape, sequences: float, context: float) -> float:
    """Of one more token of each sequence, which attends to all `context` tokens before it; in a forward pass a token does to half of its
    sequence."""
    return flop(shape, sequences, 2 * context, targets=sequences)


def backward_flop(shape: ModelShape, config: Trainable | None, tokens: float, length: float, *, targets: float, recomputed: bool) -> float:
    """Of the backward pass to `flop`: gradients of the states above the frozen layers, and of the weights that `config` trains (None: all).
    recomputed: those layers, not the head, run forward once more."""
    lora = None if config is None else config.lora
    frozen = 0 if config is None else frozen_layers(shape, config)
    upper = replace(shape, layers=shape.layers - frozen)
    attention = flop(upper, tokens, length) - FORWARD * upper.layers * shape.layer * tokens  # its gradients are of two products, not one
    # adapters are weights that states pass through as well
    weights = tokens * (2 * adapter_parameters(shape, lora) if lora else upper.layers * shape.layer)
    head_learns = lora.embeddings if lora else not (frozen and shape.tied)
    states = flop(upper, tokens, length, targets=targets)
    learned = FORWARD * (weights + shape.embedding * targets * head_learns)
    return states + attention + learned + (flop(upper, tokens, length) if recomputed else 0.0)


def communication(parameters: int, trained: int, ds: DeepSpeedConfig, width: int, ranks: int, accumulation: int, link: float) -> float:
    """Seconds of collectives in one optimizer step. Gradients of what is trained are reduced and scattered, then they (ZeRO 0: an
    all-reduce is both) or the new weights are gathered; ZeRO 3 gathers all parameters for every forward and backward pass instead.

    Each moves the share of the other ranks, (N - 1) / N (ZeRO, section 7: https://arxiv.org/abs/1910.02054)."""
    reduced = trained * (accumulation if ds.zero_stage >= 2 else 1)
    gathered = 2 * accumulation * parameters if ds.zero_stage == 3 else trained
    return (reduced + gathered) * width * (ranks - 1) / ranks / link


def micro_batches(config: TrainingConfig | PpoConfig, tokens: float) -> int:
    """Forward passes with gradients for one optimizer step of one worker, which has so many tokens."""
    limit = config.micro_batch_tokens
    return config.accumulation if limit is None else min(config.accumulation, max(1, math.ceil(tokens / limit)))


def host_adam(trained: int, ds: DeepSpeedConfig, ranks: int) -> float:
    """Seconds of Adam on the host in one optimizer step: it reads and writes master weights and moments, and reads gradients."""
    return (2 * (MASTER + MOMENTS) + 4) * trained / ranks / HOST_ADAM_BANDWIDTH if ds.offload_optimizer else 0.0
