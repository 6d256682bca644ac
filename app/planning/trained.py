"""What is trained of a model, by parameters: everything, the upper layers, or low-rank adapters."""

from __future__ import annotations

from app.config.shared import AdapterConfig, Trainable
from app.planning.memory import NOTHING, Batch, Trained
from app.planning.shapes import ModelShape


def linear_layers(shape: ModelShape) -> tuple[tuple[str, int, int], ...]:
    """Linear layers of one layer of the trunk: the last part of their names, numbers in and numbers out per token."""
    wide, inner, queries, keys = shape.hidden, shape.intermediate, shape.queries, shape.keys
    if shape.kind == "neox":
        attention = (("query_key_value", wide, queries + 2 * keys), ("dense", queries, wide))
        return (*attention, ("dense_h_to_4h", wide, inner), ("dense_4h_to_h", inner, wide))
    if shape.kind == "gpt2":
        attention = (("c_attn", wide, queries + 2 * keys), ("c_proj", queries, wide))
        return (*attention, ("c_fc", wide, inner), ("c_proj", inner, wide))
    ends = (("q_proj", wide, queries), ("k_proj", wide, keys), ("v_proj", wide, keys), ("o_proj", queries, wide))
    return (*ends, ("gate_proj", wide, inner), ("up_proj", wide, inner), ("down_proj", inner, wide))


def unknown_targets(shape: ModelShape, lora: AdapterConfig) -> tuple[str, ...]:
    """Names among the targets that are no linear layer of this kind of model, as far as is known here."""
    known = {name for name, _, _ in linear_layers(shape)}
    return tuple(name for name in lora.targets if name not in known)


def adapter_parameters(shape: ModelShape, lora: AdapterConfig) -> int:
    """Of adapters beside the targeted linear layers of the trunk: rank x (numbers in + numbers out) for each.

    Training refuses a target that is no layer of the model. Where a Llama's layers are only assumed (see `KINDS`), a target of unknown
    name may be a layer all the same: then adapters beside all linear layers are counted, which is seldom too little."""
    return shape.layers * lora.rank * sum(into + out for _, into, out in _adapted(shape, lora))


def _adapted(shape: ModelShape, lora: AdapterConfig) -> list[tuple[str, int, int]]:
    unknown = unknown_targets(shape, lora)
    every = not lora.targets or unknown == lora.targets or (unknown and shape.kind == "llama")
    return [layer for layer in linear_layers(shape) if every or layer[0] in lora.targets]


def kept_more(shape: ModelShape, config: Trainable) -> int:
    """Numbers per token that autograd keeps of each layer with adapters, beside those of one that is trained whole (a test counts them).

    A linear layer that is frozen needs its input for its adapter alone, and a frozen RMS norm keeps one thing less; each adapter keeps
    what is between its two matrices."""
    if config.lora is None or shape.kind == "gpt2":
        return 0
    names = {name for name, _, _ in _adapted(shape, config.lora)}
    wide, inner = shape.hidden, shape.intermediate
    if shape.kind == "neox":
        inputs = [({"query_key_value"}, wide), ({"dense"}, shape.queries), ({"dense_h_to_4h"}, wide), ({"dense_4h_to_h"}, inner)]
        norms = 0
    else:  # attention keeps its output, which o_proj reads, in any case
        inputs = [({"q_proj", "k_proj", "v_proj"}, wide), ({"gate_proj", "up_proj"}, wide), ({"down_proj"}, inner)]
        norms = 2 * wide
    return config.lora.rank * len(names) - norms - sum(size for readers, size in inputs if not readers & names)


def trained_parameters(shape: ModelShape, config: Trainable, parameters: int) -> int:
    """Parameters with gradients, of a model of `parameters`: everything, the upper layers, or adapters with or without token embeddings
    and output head."""
    if config.freeze_layers:
        return parameters - shape.embedding - min(config.freeze_layers, shape.layers) * shape.layer
    if config.lora is None:
        return parameters
    ends = shape.embedding + parameters - shape.trunk  # behind the trunk there is the output head, if anything
    return adapter_parameters(shape, config.lora) + (ends if config.lora.embeddings else 0)


def frozen_layers(shape: ModelShape, config: Trainable) -> int:
    """Lowest layers that no gradient passes through. GPT-2's position embeddings lie below them all and are trained."""
    return 0 if shape.kind == "gpt2" else min(config.freeze_layers, shape.layers)


def trained_model(
    shape: ModelShape, config: Trainable, parameters: int, batch: Batch = NOTHING, held: Batch = NOTHING, logit_gradients: int = 1
) -> Trained:
    """A model of `parameters` of which `config` says what is trained; what passes through it as in `Trained`."""
    adapters = adapter_parameters(shape, config.lora) if config.lora else 0
    trained = trained_parameters(shape, config, parameters)
    return Trained(
        shape, parameters + adapters, trained, batch, held, frozen_layers(shape, config), logit_gradients, kept_more(shape, config)
    )


def value_head(shape: ModelShape) -> int:
    """Parameters of `app.models.heads.ValueHead` on a model's states."""
    return (shape.hidden + 1) * 2 * shape.hidden + 2 * shape.hidden + 1
