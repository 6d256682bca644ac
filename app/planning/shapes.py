"""Sizes of decoder models, from their `config.json` or from their names.

Shape legend: H hidden size, I intermediate size, Q = heads x head size, K = key-value heads x head size, V vocabulary rows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from app.errors import ModelError, first_line

Kind = Literal["neox", "llama", "gpt2"]
KINDS: dict[str, Kind] = {"gpt_neox": "neox", "gpt2": "gpt2"}
"""`model_type` -> how its layers are built; every other decoder counts as one of Llama's kind (RMS norms, gated MLP)."""

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""Keys of a config.json that say how many experts a layer has: Mixtral, Qwen, DeepSeek."""


@dataclass(frozen=True)
class ModelShape:
    """A decoder. `attention_bias` is that of query, key and value; `tied` heads are the token embeddings."""

    kind: Kind
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    context: int
    tied: bool = False
    attention_bias: bool = False

    @property
    def queries(self) -> int:
        """Q: width of all query heads."""
        return self.heads * self.head_size

    @property
    def keys(self) -> int:
        """K: width of all key-value heads."""
        return self.kv_heads * self.head_size

    @property
    def embedding(self) -> int:
        """Parameters of the token embeddings; an untied output head has as many."""
        return self.vocabulary * self.hidden

    @property
    def layer(self) -> int:
        """Parameters of one layer, with biases and norms."""
        wide, inner, attention = self.hidden, self.intermediate, self.queries + 2 * self.keys
        if self.kind == "llama":
            return wide * attention + attention * self.attention_bias + self.queries * wide + 3 * wide * inner + 2 * wide
        return wide * attention + attention + self.queries * wide + wide + 2 * wide * inner + inner + wide + 4 * wide

    @property
    def trunk(self) -> int:
        """Parameters without the output head: what a reward model or critic keeps, whose own head is negligible."""
        positions = self.context * self.hidden if self.kind == "gpt2" else 0
        norm = self.hidden if self.kind == "llama" else 2 * self.hidden
        return self.embedding + positions + self.layers * self.layer + norm

    @property
    def parameters(self) -> int:
        """Parameters of the language model."""
        return self.trunk + (0 if self.tied else self.embedding)

    def kv_bytes(self, width: int, parallel: int = 1) -> int:
        """Bytes of keys and values per token of context, on each of `parallel` GPUs that share the heads; `width` is bytes per number.
        Where there are more GPUs than key-value heads, several hold the same one."""
        return 2 * self.layers * max(1, self.kv_heads // parallel) * self.head_size * width

    def scaled(self, parameters: int) -> ModelShape:
        """A model of about so many parameters: this one with wider layers, in its own proportions."""
        low, high = 1, 1024
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._widened(middle).parameters <= parameters else (low, middle)
        return self._widened(low)

    def _widened(self, step: int) -> ModelShape:
        width = 64 * step
        heads = max(1, width // self.head_size)
        inner = width * self.intermediate // self.hidden
        return replace(self, hidden=width, intermediate=inner, heads=heads, kv_heads=heads)


def shape_from_config(config: Mapping[str, Any]) -> ModelShape | None:
    """The shape that a `config.json` describes; None where it names no decoder sizes, and for mixtures of experts, whose layers are not
    counted here."""
    inside = config.get("text_config")
    if isinstance(inside, Mapping):
        config = inside

    def find(*names: str) -> Any:
        return next((config[name] for name in names if config.get(name) is not None), None)

    hidden, layers, heads = find("hidden_size", "n_embd"), find("num_hidden_layers", "n_layer"), find("num_attention_heads", "n_head")
    vocabulary = find("vocab_size")
    if not all(isinstance(size, int) for size in (hidden, layers, heads, vocabulary)) or (find(*EXPERTS) or 0) > 1:
        return None
    kind = KINDS.get(config.get("model_type", ""), "llama")
    biased = find("attention_bias", "qkv_bias")
    return ModelShape(
        kind=kind,
        layers=layers,
        hidden=hidden,
        intermediate=find("intermediate_size", "n_inner") or 4 * hidden,
        heads=heads,
        kv_heads=find("num_key_value_heads") or heads,
        head_size=find("head_dim") or hidden // heads,
        vocabulary=vocabulary,
        context=find("max_position_embeddings", "n_positions") or 2048,
        tied=bool(config.get("tie_word_embeddings", kind != "neox")),
        attention_bias=bool(biased) if biased is not None else config.get("model_type") == "qwen2",
    )


def _neox(layers: int, hidden: int, heads: int, vocabulary: int = 50304, context: int = 2048) -> ModelShape:
    return ModelShape("neox", layers, hidden, 4 * hidden, heads, heads, hidden // heads, vocabulary, context)


def _llama(
    layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, vocabulary: int, context: int, *, tied: bool = False
) -> ModelShape:
    return ModelShape("llama", layers, hidden, intermediate, heads, kv_heads, hidden // heads, vocabulary, context, tied)


EMBEDDED = _neox(4, 192, 3, 1024, 512)
"""Of the model that `model.path = "embedded"` builds, with the largest vocabulary it may get."""

SHAPES: dict[str, ModelShape] = {
    "pythia-14m": _neox(6, 128, 4),
    "pythia-70m": _neox(6, 512, 8),
    "pythia-160m": _neox(12, 768, 12),
    "pythia-410m": _neox(24, 1024, 16),
    "pythia-1b": _neox(16, 2048, 8),
    "pythia-1.4b": _neox(24, 2048, 16),
    "pythia-2.8b": _neox(32, 2560, 32),
    "pythia-6.9b": _neox(32, 4096, 32, 50432),
    "pythia-12b": _neox(36, 5120, 40, 50688),
    "gpt-neox-20b": _neox(44, 6144, 64, 50432),
    "smollm2-135m": _llama(30, 576, 1536, 9, 3, 49152, 8192, tied=True),
    "smollm2-360m": _llama(32, 960, 2560, 15, 5, 49152, 8192, tied=True),
    "smollm2-1.7b": _llama(24, 2048, 8192, 32, 32, 49152, 8192, tied=True),
    "llama-7b": _llama(32, 4096, 11008, 32, 32, 32000, 2048),
    "llama-13b": _llama(40, 5120, 13824, 40, 40, 32000, 2048),
    "llama-30b": _llama(60, 6656, 17920, 52, 52, 32000, 2048),
    "llama-65b": _llama(80, 8192, 22016, 64, 64, 32000, 2048),
    "llama-3-8b": _llama(32, 4096, 14336, 32, 8, 128256, 8192),
    "llama-3-70b": _llama(80, 8192, 28672, 64, 8, 128256, 8192),
    "mistral-7b": _llama(32, 4096, 14336, 32, 8, 32000, 32768),
}
"""Of models whose names say who they are; any other is read from its `config.json`, or scaled from Pythia-1.4B by the size in its name."""

_SIZE_IN_NAME = re.compile(r"(?<![a-z0-9.])(\d+(?:\.\d+)?)(m|b)(?![a-z0-9])", re.IGNORECASE)


def cache_bytes(config: Mapping[str, Any], tokens: int, width: int) -> int:
    """KV cache of one sequence for a `config.json`, `width` bytes per number; 0 where it names no sizes, and for models that keep less than
    keys and values of every layer, which vLLM counts itself."""
    text = config.get("text_config") or config
    shape = shape_from_config(config)
    if shape is None or text.get("sliding_window") or text.get("kv_lora_rank"):
        return 0
    return tokens * shape.kv_bytes(width)


_SAME_SIZE = 0.02  # share by which the sizes in two names may differ


def shape_of(path: str) -> ModelShape | None:
    """The shape of what `model.path` names: a folder's `config.json`, else its name (`EleutherAI/pythia-12b-deduped`,
    `runs/pythia/sft-12b/sft/model`, `models/x-7b`); None where neither tells. Raises ModelError for a damaged `config.json`."""
    if path == "embedded":
        return EMBEDDED
    file = Path(path).expanduser() / "config.json"
    if file.is_file():
        return shape_from_config(stored_json(file))
    return _named(path.lower())


def stored_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file of a model folder. Raises ModelError where it holds anything else."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"model {file.parent}: its {file.name} cannot be read ({first_line(error)}); copy that file again") from error
    if not isinstance(value, dict):
        raise ModelError(f"model {file.parent}: its {file.name} holds a {type(value).__name__}, not an object; copy that file again")
    return value


def _named(path: str) -> ModelShape | None:
    for name, shape in SHAPES.items():
        if re.search(rf"(?<![a-z0-9]){re.escape(name)}(?![a-z0-9.])", path):
            return shape
    size = size_in_name(path)
    if size is None:
        return SHAPES["smollm2-135m"] if "smollm2" in path else None
    of_size = [name for name in SHAPES if abs((size_in_name(name) or 0) - size) <= _SAME_SIZE * size]
    of_family = [name for name in of_size if name.split("-")[0] in path]
    return SHAPES[(of_family or of_size)[0]] if of_size else SHAPES["pythia-1.4b"].scaled(size)


def size_in_name(path: str) -> int | None:
    """Parameters as the last size in a path says (`pythia-1.4b`, `runs/sft-12b/sft/model`); None where there is none.

    >>> size_in_name("pythia-1.4b"), size_in_name("models/4bit")
    (1400000000, None)
    """
    sizes = _SIZE_IN_NAME.findall(path)
    if not sizes:
        return None
    number, unit = sizes[-1]
    return int(float(number) * (1e9 if unit.lower() == "b" else 1e6))
