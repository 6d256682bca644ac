"""Bytes that training, scoring and sampling take on one device, by what holds them.

The sources: ZeRO (Rajbhandari et al., 2020, https://arxiv.org/abs/1910.02054) for what is sharded, DeepSpeed's own buffers as its
optimizers allocate them, and what autograd saves for one layer of each kind (a test counts it on real models).
Symbols: P parameters, T trained ones, N ranks, w bytes per number (2 or 4), H, I, Q, K, V as in `app.planning.shapes`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from app.config.shared import DeepSpeedConfig
from app.planning.shapes import ModelShape

Parts = dict[str, int]
"""Bytes by what holds them; they add up to the whole."""

WIDTHS = {"fp32": 4, "bf16": 2, "fp16": 2}
GIB = 2**30
MASTER, MOMENTS = 4, 8  # bytes per trained parameter of a float32 copy, and of Adam's two moments
REDUCE_BUCKET = 500_000_000  # numbers: DeepSpeed's default of zero_optimization.reduce_bucket_size
LIVE_PARAMETERS = 1_000_000_000  # DeepSpeed's default of stage3_max_live_parameters
HOST_SLACK = 0.06  # of host memory, between the blocks that the allocator gave out: docs/results/plan.md
LOGITS_PER_CHUNK = 2**25  # numbers: app.models.forward works through a reference's logits in such pieces
ENGINE_TOKENS, ENGINE_SEQUENCES = 8192, 256  # what vLLM measures its workspace with


def add(*parts: Parts) -> Parts:
    """Part by part.

    >>> add({"weights": 2}, {"weights": 1, "logits": 5})
    {'weights': 3, 'logits': 5}
    """
    names = dict.fromkeys(name for each in parts for name in each)
    return {name: sum(each.get(name, 0) for each in parts) for name in names}


def total(parts: Parts) -> int:
    """Bytes of all parts."""
    return sum(parts.values())


@dataclass(frozen=True)
class Batch:
    """One forward pass with gradients. rows: sequences; length: tokens of the longest; targets: tokens that the head runs on."""

    rows: int
    length: int
    targets: int = 0

    @property
    def tokens(self) -> int:
        return self.rows * self.length


NOTHING = Batch(0, 0)


def largest_pass(rows: int, length: int, *, tokens: int | None, most: int, least: int = 1) -> tuple[int, int]:
    """Sequences of the largest forward pass, and tokens of each of them: `rows` of `length`, or where a pass is bounded by `tokens` as
    many as make that. most: sequences that a worker has for an optimizer step; least: those that go together however long they are.

    >>> largest_pass(8, 1000, tokens=None, most=4), largest_pass(8, 1000, tokens=2700, most=4), largest_pass(8, 1000, tokens=10, most=4)
    ((4, 1000), (3, 900), (1, 1000))
    """
    if tokens is None:
        return min(rows, most), length
    whole = min(max(tokens, least * length), most * length)
    rows = math.ceil(whole / length)
    return rows, math.ceil(whole / rows)


@dataclass(frozen=True)
class Trained:
    """One DeepSpeed engine: a model of `parameters`, `trained` of which have gradients, and what passes through it."""

    shape: ModelShape
    parameters: int
    trained: int
    batch: Batch
    held: Batch = NOTHING
    """What other forward passes took whose backward passes are still to come."""
    frozen_layers: int = 0
    """Lowest layers that no gradient passes through: they keep no activations."""
    logit_gradients: int = 1
    """Gradients of the logits that are alive together: an entropy bonus has one of its own, which autograd adds to the loss's."""
    kept_more: int = 0
    """Numbers per token that each layer keeps beside those of one that is trained whole; below 0 where it keeps fewer."""


@dataclass(frozen=True)
class TrainingMemory:
    """resting: between steps; working: at the peak of a step, resting parts included; host: what offloading moves there."""

    resting: Parts
    working: Parts
    host: Parts


def training_memory(models: Iterable[Trained], ds: DeepSpeedConfig, *, width: int, ranks: int, on_gpu: bool) -> TrainingMemory:
    """Of one rank that trains `models` in engines of their own, which take turns at nothing: all their parts are alive together."""
    resting, backward, step, host = Parts(), Parts(), Parts(), Parts()
    for model in models:
        held = _resting(model, ds, width, ranks, on_gpu)
        gradients = {"gradients": _gradients(model, ds, width, ranks)}
        resting = add(resting, held)
        backward = add(backward, held, gradients, {"buffers": _backward_buffers(model, ds, width, on_gpu)}, activations(model, ds, width))
        step = add(step, held, gradients, {"buffers": _step_buffers(model, ds, ranks, on_gpu)})
        host = add(host, _offloaded(model, ds, width, ranks))
    working = max(backward, step, key=total)
    return TrainingMemory(resting, working if on_gpu else {**working, "allocator": int(HOST_SLACK * total(working))}, host)


def _resting(model: Trained, ds: DeepSpeedConfig, width: int, ranks: int, on_gpu: bool) -> Parts:
    shards = ranks if ds.zero_stage == 3 else 1
    optimizer = MOMENTS * model.trained if ds.zero_stage == 0 else (MASTER + MOMENTS) * model.trained // ranks
    return {
        "weights": 0 if ds.offload_parameters else width * model.parameters // shards,
        "optimizer": 0 if ds.offload_optimizer else optimizer,
        # the largest gradient, on its way to the host
        "buffers": width * min(model.shape.embedding, model.trained) if ds.offload_optimizer and on_gpu else 0,
    }


def _offloaded(model: Trained, ds: DeepSpeedConfig, width: int, ranks: int) -> Parts:
    gradient = 4
    optimizer = (MASTER + MOMENTS + gradient + width) * model.trained // ranks if ds.offload_optimizer else 0
    return {"optimizer": optimizer, "weights": width * model.parameters // ranks if ds.offload_parameters else 0}


def _gradients(model: Trained, ds: DeepSpeedConfig, width: int, ranks: int) -> int:
    """Kept from one micro-batch to the next: whole where nothing shards them, on the host where they are offloaded."""
    if ds.zero_stage < 2:
        return width * model.trained
    return 0 if ds.offload_optimizer else width * model.trained // ranks


def _backward_buffers(model: Trained, ds: DeepSpeedConfig, width: int, on_gpu: bool) -> int:
    """Gradients waiting to be reduced, the largest one on its way there and, under ZeRO 3, parameters gathered for use."""
    largest = width * model.shape.embedding * (2 if model.shape.tied else 1)  # tied: the head's gradient waits for the embeddings'
    largest = min(largest, width * model.trained)
    if ds.zero_stage == 0:
        return largest
    settings = ds.extra.get("zero_optimization", {})
    bucket = int(settings.get("reduce_bucket_size", REDUCE_BUCKET))
    pages = bucket if on_gpu else min(bucket, model.trained)  # host memory counts only where it is written to
    copies = 2 if settings.get("overlap_comm", ds.zero_stage == 3) and on_gpu else 1
    return width * copies * pages + _gathered(model, ds, width) + largest


def _gathered(model: Trained, ds: DeepSpeedConfig, width: int) -> int:
    """Parameters that ZeRO 3 has collected from all ranks for use."""
    live = int(ds.extra.get("zero_optimization", {}).get("stage3_max_live_parameters", LIVE_PARAMETERS))
    return width * min(live, model.parameters) if ds.zero_stage == 3 else 0


def _step_buffers(model: Trained, ds: DeepSpeedConfig, ranks: int, on_gpu: bool) -> int:
    """The float32 gradients of this rank's share and, where Adam is not one fused kernel, the root of its second moment."""
    if ds.offload_optimizer:
        return 0
    share = 4 * model.trained // (ranks if ds.zero_stage else 1)
    return (share if ds.zero_stage else 0) + (share if on_gpu else 0)


def activations(model: Trained, ds: DeepSpeedConfig, width: int) -> Parts:
    """At the start of a backward pass: what every layer keeps, the logits of every open pass, and the larger of the logits' gradients,
    and one layer's work."""
    shape, batch = model.shape, model.batch
    layer = layer_activations(shape, width) + model.kept_more * width
    layers = (shape.layers - model.frozen_layers) * (shape.hidden * width if ds.gradient_checkpointing else layer)
    work = batch.tokens * (_work(shape) * width + (layer if ds.gradient_checkpointing else 0))
    logits = (1 + model.logit_gradients) * batch.targets * shape.vocabulary * width

    def kept(batch: Batch) -> int:
        mask = batch.tokens * batch.length * width
        ends = (3 * batch.tokens + batch.targets) * shape.hidden * width  # the final norm, and the states that the head reads
        return batch.tokens * layers + mask + ends

    return {
        "activations": kept(batch) + kept(model.held) + max(0, work - logits),
        "logits": logits + model.held.targets * shape.vocabulary * width,
    }


def inspection(model: Trained, ds: DeepSpeedConfig, width: int, *, kept: bool) -> Parts:
    """Forward passes before anything is learnt from them, beside what is resting. kept: with what their backward passes need, those
    `held` too; else one after the other without."""
    buffers = {"buffers": _gathered(model, ds, width)}
    if kept:
        return add(activations(replace(model, logit_gradients=0), ds, width), buffers)
    shape, batch = model.shape, model.batch
    work = batch.tokens * (_work(shape) + batch.length) * width
    return {"activations": work, "logits": batch.targets * shape.vocabulary * width, **buffers}


def layer_activations(shape: ModelShape, width: int) -> int:
    """Bytes per token that autograd saves for one layer, dropout off, attention fused."""
    wide, inner, queries, keys = shape.hidden, shape.intermediate, shape.queries, shape.keys
    if shape.kind == "neox":
        numbers = 4 * wide + 3 * queries + 3 * keys + 2 * inner
    elif shape.kind == "gpt2":
        numbers = 8 * wide + 5 * inner
    else:
        in_float32 = 2 * wide if width == 2 else 0  # RMS norms keep their input as float32
        numbers = 6 * wide + 3 * queries + 2 * keys + 4 * inner + in_float32
    return numbers * width + 4 * shape.heads


def _work(shape: ModelShape) -> int:
    """Numbers per token that one layer's forward or backward pass holds for a moment."""
    return 4 * shape.hidden + (3 if shape.kind == "llama" else 2) * shape.intermediate


def scoring_memory(shape: ModelShape, *, width: int, tokens: int, length: int, with_head: bool) -> Parts:
    """One replica that scores at most `tokens` at a time, in sequences of up to `length`; with_head: it gives log-probs."""
    tokens = max(tokens, length)
    return {
        "weights": width * (shape.parameters if with_head else shape.trunk),
        "activations": tokens * (_work(shape) + length) * width,
        "logits": min(LOGITS_PER_CHUNK, tokens * shape.vocabulary) * (width + 4) if with_head else 0,
    }


def engine_memory(shape: ModelShape, *, width: int, tensor_parallel: int, context: int, reserved: int | None) -> Parts:
    """A rollout engine on each of its GPUs. It fills what it has `reserved` with KV cache; without that, room for one sequence."""
    weights = width * shape.parameters // tensor_parallel
    work = (ENGINE_TOKENS * _work(shape) * width + ENGINE_SEQUENCES * shape.vocabulary * 4) // tensor_parallel
    least = context * shape.kv_bytes(width, tensor_parallel)
    cache = least if reserved is None else max(least, reserved - weights - work)
    return {"weights": weights, "activations": work, "kv_cache": cache}


def cpu_engine_memory(shape: ModelShape, *, width: int, kv_cache: int) -> Parts:
    """A rollout engine in host memory: its output head is held a second time, packed for the matrix units."""
    return {"weights": width * (shape.parameters + shape.embedding), "kv_cache": kv_cache}
