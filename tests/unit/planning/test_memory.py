"""Bytes by what holds them: properties, and layers counted beside what autograd saves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from app.config.ppo import PpoConfig
from app.config.shared import AdapterConfig, DeepSpeedConfig
from app.config.training import SftConfig
from app.models.trainable import choose_trainable
from app.planning.memory import (
    GIB,
    NOTHING,
    Batch,
    Parts,
    Trained,
    TrainingMemory,
    activations,
    add,
    engine_memory,
    layer_activations,
    scoring_memory,
    total,
    training_memory,
)
from app.planning.shapes import SHAPES, ModelShape
from app.planning.trained import adapter_parameters, kept_more, trained_model, trained_parameters, unknown_targets

WIDE, INNER, HEADS, VOCABULARY = 64, 160, 4, 96
SIZES = {"vocab_size": VOCABULARY, "hidden_size": WIDE, "intermediate_size": INNER, "num_attention_heads": HEADS}


def build(kind: str, layers: int) -> tuple[torch.nn.Module, ModelShape]:
    if kind == "neox":
        model: torch.nn.Module = GPTNeoXForCausalLM(
            GPTNeoXConfig(**SIZES, num_hidden_layers=layers, hidden_dropout=0.0, attention_dropout=0.0)
        )
    elif kind == "gpt2":
        off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=WIDE, n_inner=INNER, n_head=HEADS, n_layer=layers, **off))
    else:
        model = LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=layers, num_key_value_heads=2))
    keys = 2 if kind == "llama" else HEADS
    return model, ModelShape(kind, layers, WIDE, INNER, HEADS, keys, WIDE // HEADS, VOCABULARY, 128)  # type: ignore[arg-type]


def saved_bytes(model: torch.nn.Module, rows: int, length: int) -> int:
    """What autograd keeps for the backward pass, parameters aside; every storage once."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.train().base_model(input_ids=torch.zeros(rows, length, dtype=torch.long), use_cache=False)  # type: ignore[operator]
    size = sum(storage.nbytes() for address, storage in kept.items() if address not in parameters)
    assert output.last_hidden_state.requires_grad
    return size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["neox", "llama", "gpt2"])
def test_a_layers_activations_are_what_autograd_saves(kind: str, dtype: torch.dtype) -> None:
    sizes = []
    for layers in (1, 2):
        model, shape = build(kind, layers)
        sizes.append(saved_bytes(model.to(dtype), rows=2, length=32))
    per_token = (sizes[1] - sizes[0]) / 64
    assert per_token == pytest.approx(layer_activations(shape, dtype.itemsize), rel=0.06)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("neox", ()),
        ("neox", ("query_key_value",)),
        ("neox", ("dense_h_to_4h", "dense_4h_to_h")),
        ("llama", ()),
        ("llama", ("q_proj", "v_proj")),
        ("llama", ("o_proj", "down_proj")),
        ("llama", ("gate_proj", "up_proj", "down_proj")),
    ],
)
def test_a_layer_with_adapters_keeps_what_they_read(kind: str, targets: tuple[str, ...], dtype: torch.dtype) -> None:
    per_token = []
    for config in (SftConfig(), SftConfig(lora=AdapterConfig(rank=4, targets=targets))):
        sizes = []
        for layers in (1, 2):
            model, shape = build(kind, layers)
            choose_trainable(model, config, seed=0)  # type: ignore[arg-type]
            sizes.append(saved_bytes(model.to(dtype), rows=2, length=32))
        per_token.append((sizes[1] - sizes[0]) / 64)
    assert per_token[1] - per_token[0] == pytest.approx(kept_more(shape, config) * dtype.itemsize, abs=0.02 * per_token[0])


@pytest.mark.parametrize("kind", ["neox", "llama", "gpt2"])
def test_frozen_layers_keep_no_activations(kind: str) -> None:
    """But GPT-2's, whose position embeddings are trained below them."""
    sizes, expected = [], []
    for frozen in (0, 2):
        model, shape = build(kind, 4)
        config = SftConfig(freeze_layers=frozen)
        choose_trainable(model, config, seed=0)  # type: ignore[arg-type]
        sizes.append(saved_bytes(model, rows=2, length=32))
        trained = trained_model(shape, config, shape.parameters, Batch(2, 32))
        expected.append(activations(trained, DeepSpeedConfig(zero_stage=0), 4)["activations"])
    if kind == "gpt2":
        assert expected[0] == expected[1] and sizes[1] > 0.8 * sizes[0]
    else:
        assert expected[0] - expected[1] == pytest.approx(sizes[0] - sizes[1], rel=0.1)


def test_open_passes_keep_their_logits_and_share_the_room_for_a_gradient() -> None:
    shape, ds, batch = SHAPES["pythia-70m"], DeepSpeedConfig(), Batch(2, 64, 64)
    one, three = (
        activations(Trained(shape, shape.parameters, shape.parameters, batch, held), ds, 4) for held in (NOTHING, Batch(4, 64, 128))
    )
    assert (one["logits"], three["logits"]) == (2 * 64 * shape.vocabulary * 4, 4 * 64 * shape.vocabulary * 4)
    assert three["activations"] == 3 * one["activations"]


def plan(shape: ModelShape, ds: DeepSpeedConfig, batch: Batch, *, width: int = 2, ranks: int = 1, on_gpu: bool = True) -> Parts:
    model = Trained(shape, shape.parameters, shape.parameters, batch)
    return training_memory([model], ds, width=width, ranks=ranks, on_gpu=on_gpu).working


NAMES = st.sampled_from(sorted(SHAPES))
BATCHES = st.builds(Batch, rows=st.integers(1, 16), length=st.integers(8, 4096), targets=st.integers(0, 4096))
CONFIGS = st.builds(DeepSpeedConfig, zero_stage=st.sampled_from([1, 2, 3]), gradient_checkpointing=st.booleans())
WIDTHS = st.sampled_from([2, 4])
RANKS = st.sampled_from([1, 2, 4, 8, 16, 64])
FEW = settings(max_examples=40, deadline=None)


@FEW
@given(NAMES, CONFIGS, BATCHES, WIDTHS, RANKS)
def test_more_layers_sequence_or_rows_take_more(name: str, ds: DeepSpeedConfig, batch: Batch, width: int, ranks: int) -> None:
    shape = SHAPES[name]
    base = total(plan(shape, ds, batch, width=width, ranks=ranks))
    more = {"width": width, "ranks": ranks}
    assert total(plan(replace(shape, layers=2 * shape.layers), ds, batch, **more)) > base
    assert total(plan(shape, ds, replace(batch, length=2 * batch.length), **more)) >= base
    assert total(plan(shape, ds, replace(batch, rows=2 * batch.rows, targets=2 * batch.targets), **more)) >= base
    trained = Trained(shape, shape.parameters, shape.parameters, batch)
    twice = replace(trained, batch=replace(batch, rows=2 * batch.rows))
    assert total(activations(twice, ds, width)) > total(activations(trained, ds, width))


@FEW
@given(NAMES, CONFIGS, BATCHES, WIDTHS, RANKS, st.booleans())
def test_more_ranks_and_higher_stages_take_less(name: str, ds: DeepSpeedConfig, batch: Batch, width: int, ranks: int, on_gpu: bool) -> None:
    base = total(plan(SHAPES[name], ds, batch, width=width, ranks=ranks, on_gpu=on_gpu))
    assert total(plan(SHAPES[name], ds, batch, width=width, ranks=2 * ranks, on_gpu=on_gpu)) <= base
    if ds.zero_stage < 2:
        higher = ds.model_copy(update={"zero_stage": 2})
        assert total(plan(SHAPES[name], higher, batch, width=width, ranks=ranks, on_gpu=on_gpu)) <= base


@FEW
@given(NAMES, BATCHES, st.sampled_from([4, 8, 16]))
def test_parameters_are_sharded_by_stage_3_alone(name: str, batch: Batch, ranks: int) -> None:
    weights = {
        stage: plan(SHAPES[name], DeepSpeedConfig.model_validate({"zero_stage": stage}), batch, ranks=ranks)["weights"]
        for stage in (1, 2, 3)
    }
    assert weights[1] == weights[2] == 2 * SHAPES[name].parameters
    assert weights[3] == weights[2] // ranks


@FEW
@given(NAMES, BATCHES, WIDTHS, st.sampled_from([2, 4, 8, 64]))
def test_states_take_less_with_every_stage(name: str, batch: Batch, width: int, ranks: int) -> None:
    sizes = []
    for stage in (0, 1, 2, 3):
        parts = plan(SHAPES[name], DeepSpeedConfig.model_validate({"zero_stage": stage}), batch, width=width, ranks=ranks)
        sizes.append(sum(parts[part] for part in ("weights", "gradients", "optimizer")))
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4


@FEW
@given(NAMES, CONFIGS, BATCHES, RANKS)
def test_recomputing_activations_never_takes_more(name: str, ds: DeepSpeedConfig, batch: Batch, ranks: int) -> None:
    with_, without = (ds.model_copy(update={"gradient_checkpointing": value}) for value in (True, False))
    assert total(plan(SHAPES[name], with_, batch, ranks=ranks)) <= total(plan(SHAPES[name], without, batch, ranks=ranks)) * 1.001


@FEW
@given(NAMES, BATCHES, RANKS)
def test_offloading_moves_the_optimizer_to_the_host(name: str, batch: Batch, ranks: int) -> None:
    shape = SHAPES[name]
    model = Trained(shape, shape.parameters, shape.parameters, batch)
    on_device = training_memory([model], DeepSpeedConfig(zero_stage=2), width=2, ranks=ranks, on_gpu=True)
    offloaded = training_memory([model], DeepSpeedConfig(zero_stage=2, offload_optimizer=True), width=2, ranks=ranks, on_gpu=True)
    assert on_device.host["optimizer"] == 0 and offloaded.host["optimizer"] >= on_device.resting["optimizer"]
    assert offloaded.working["optimizer"] == 0 and total(offloaded.resting) < total(on_device.resting) + 2 * shape.embedding


def test_adam_in_full_float32_takes_sixteen_bytes_a_parameter() -> None:
    shape = SHAPES["pythia-1.4b"]
    parts = plan(shape, DeepSpeedConfig(zero_stage=0), Batch(1, 8), width=4, on_gpu=False)
    assert parts["weights"] + parts["optimizer"] + parts["gradients"] == 16 * shape.parameters


def test_two_engines_in_one_process_add_up() -> None:
    shape, batch, ds = SHAPES["pythia-1b"], Batch(2, 64, 64), DeepSpeedConfig(zero_stage=2)
    model = Trained(shape, shape.parameters, shape.parameters, batch)
    one = training_memory([model], ds, width=2, ranks=2, on_gpu=True)
    two = training_memory([model, model], ds, width=2, ranks=2, on_gpu=True)
    assert two.resting == add(one.resting, one.resting)
    assert total(two.working) == 2 * total(one.working)


def test_host_memory_that_the_allocator_cannot_reuse_counts() -> None:
    parts = plan(SHAPES["pythia-70m"], DeepSpeedConfig(), Batch(4, 256, 1020), width=4, on_gpu=False)
    assert parts["allocator"] == int(0.06 * (total(parts) - parts["allocator"]))
    assert "allocator" not in plan(SHAPES["pythia-70m"], DeepSpeedConfig(), Batch(4, 256, 1020))


def test_what_is_not_trained_has_no_gradients() -> None:
    shape = SHAPES["llama-7b"]
    everything = trained_parameters(shape, SftConfig(), shape.parameters)
    upper = trained_parameters(shape, SftConfig(freeze_layers=30), shape.parameters)
    adapters = trained_parameters(shape, SftConfig(lora=AdapterConfig(embeddings=False)), shape.parameters)
    assert everything == shape.parameters
    assert upper == 2 * shape.layer + shape.embedding + shape.hidden
    assert adapters == 39_976_960  # what peft counts for r = 16 on all linear layers of Llama-7B


@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("neox", ()),
        ("neox", ("query_key_value",)),
        ("neox", ("dense", "dense_4h_to_h")),
        ("llama", ()),
        ("llama", ("q_proj", "v_proj")),
        ("llama", ("k_proj", "o_proj", "gate_proj", "up_proj", "down_proj")),
    ],
)
def test_adapters_are_as_large_as_the_layers_that_they_stand_beside(kind: str, targets: tuple[str, ...], embeddings: bool) -> None:
    model, shape = build(kind, 3)
    config = SftConfig(lora=AdapterConfig(rank=4, targets=targets, embeddings=embeddings))
    choose_trainable(model, config, seed=0)  # type: ignore[arg-type]
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained_parameters(shape, config, shape.parameters) == trained


def test_targets_of_unknown_names_count_as_all_layers() -> None:
    """A Llama's layers are assumed of every model that is neither GPT-NeoX nor GPT-2; others may be called otherwise."""
    llama, neox = SHAPES["llama-7b"], SHAPES["pythia-70m"]
    everything = adapter_parameters(llama, AdapterConfig())
    assert adapter_parameters(llama, AdapterConfig(targets=("qkv_proj", "o_proj"))) == everything
    assert adapter_parameters(llama, AdapterConfig(targets=("q_proj", "o_proj"))) < everything / 3
    assert unknown_targets(llama, AdapterConfig(targets=("qkv_proj", "o_proj"))) == ("qkv_proj",)
    assert adapter_parameters(neox, AdapterConfig(targets=("q_proj",))) == adapter_parameters(neox, AdapterConfig())  # training refuses it


@FEW
@given(NAMES, CONFIGS, BATCHES, WIDTHS, RANKS, st.integers(1, 64), st.integers(1, 80))
def test_a_policy_that_trains_less_takes_less(
    name: str, ds: DeepSpeedConfig, batch: Batch, width: int, ranks: int, rank: int, frozen: int
) -> None:
    shape = SHAPES[name]

    def memory(**settings: object) -> TrainingMemory:
        config = PpoConfig.model_validate(settings)
        return training_memory([trained_model(shape, config, shape.parameters, batch)], ds, width=width, ranks=ranks, on_gpu=True)

    whole, upper, more = memory(), memory(freeze_layers=min(frozen, shape.layers - 1)), memory(freeze_layers=shape.layers)
    adapters, wider = memory(lora={"rank": rank}), memory(lora={"rank": 2 * rank})
    for part in ("optimizer", "gradients"):
        assert whole.working[part] > upper.working[part] >= more.working[part]
        assert wider.working[part] >= adapters.working[part] > 0
    assert whole.resting["weights"] == upper.resting["weights"] < adapters.resting["weights"]
    if rank <= shape.hidden // 16:
        assert adapters.working["optimizer"] < whole.working["optimizer"] / 2
        assert total(adapters.working) < total(whole.working)
    assert total(upper.working) < total(whole.working)


@FEW
@given(NAMES, st.integers(1, 8), st.integers(16, 4096), st.integers(8, 80))
def test_an_engine_fills_what_it_is_given(name: str, parallel: int, context: int, gib: int) -> None:
    given_bytes = gib * GIB
    least = engine_memory(SHAPES[name], width=2, tensor_parallel=parallel, context=context, reserved=None)
    parts = engine_memory(SHAPES[name], width=2, tensor_parallel=parallel, context=context, reserved=given_bytes)
    assert total(parts) == max(total(least), given_bytes)


def test_a_reference_never_holds_all_logits() -> None:
    shape = SHAPES["pythia-12b"]
    parts = scoring_memory(shape, width=2, tokens=10**6, length=2048, with_head=True)
    assert parts["logits"] < 0.3 * GIB < 10**6 * shape.vocabulary
    assert scoring_memory(shape, width=2, tokens=10, length=10, with_head=False)["weights"] == 2 * shape.trunk
