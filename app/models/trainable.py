"""Which parameters of a model are trained: all of them, the upper layers, or low-rank adapters."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from app.config.recipe import Recipe
from app.config.shared import AdapterConfig, Trainable
from app.errors import ModelError
from app.models.adapters import ADAPTER, merged_weights
from app.models.embedded import VOCABULARY, build_config
from app.models.gguf import PACKAGED, gguf_config, packaged_gguf
from app.models.load import load_config
from app.models.open_assistant import OpenAssistantConfig, plain_config
from app.planning.placement import trained_sections


def choose_trainable(model: PreTrainedModel, config: Trainable, *, seed: int) -> None:
    """Freeze or adapt `model`, in place, as `config.freeze_layers` and `config.lora` say. Raises ModelError."""
    if config.lora is not None:
        add_adapters(model, config.lora, seed=seed)
    elif config.freeze_layers:
        freeze_lower_layers(model, config.freeze_layers)


def check_trainable(path: str, config: Trainable, *, trust_remote_code: bool = False) -> None:
    """Raises ModelError where `choose_trainable` would refuse the model that `path` names as `model.path` does; no weights are loaded."""
    if config.lora is None and not config.freeze_layers:
        return
    sizes = _sizes(path, trust_remote_code)
    if type(sizes) not in AutoModel._model_mapping and "AutoModel" not in (getattr(sizes, "auto_map", None) or {}):
        return  # a model without a bare trunk: it is looked at when it is loaded
    with torch.device("meta"):
        trunk = AutoModel.from_config(sizes, trust_remote_code=trust_remote_code)
        choose_trainable(trunk, config, seed=0)


def check_trained_sections(recipe: Recipe, command: str, path: str) -> None:
    """`check_trainable` for each section by which the command trains the model that `path` names. Raises ModelError that names the
    section."""
    for section in trained_sections(recipe, command):
        try:
            check_trainable(path, getattr(recipe, section), trust_remote_code=recipe.model.trust_remote_code)
        except ModelError as error:
            raise ModelError(f"{section}: {error}") from error


def _sizes(path: str, trust_remote_code: bool) -> PretrainedConfig:
    """The config of the trunk that is trained."""
    if path == "embedded":
        return build_config(VOCABULARY, eos_id=0, pad_id=0)
    if path == PACKAGED or path.endswith(".gguf"):
        return gguf_config(packaged_gguf() if path == PACKAGED else Path(path).expanduser())
    sizes = load_config(path, trust_remote_code)
    return plain_config(sizes) if isinstance(sizes, OpenAssistantConfig) else sizes


def freeze_lower_layers(model: PreTrainedModel, count: int) -> None:
    """Freeze the token embeddings and the `count` layers next to them, in place; a head tied to the embeddings is frozen with them.

    Raises ModelError when the model has no more than `count` layers.
    """
    layers = decoder_layers(model, "freeze_layers = 0")
    if count >= len(layers):
        raise ModelError(f"freeze_layers = {count} leaves nothing of the {len(layers)} layers of {type(model).__name__} to train: lower it")
    for part in (model.base_model.get_input_embeddings(), *layers[:count]):
        part.requires_grad_(False)


def decoder_layers(model: PreTrainedModel, remedy: str) -> nn.ModuleList:
    """The layers of the trunk, lowest first. Raises ModelError, with the setting that does without, when they are in no list."""
    depth = model.config.get_text_config().num_hidden_layers
    for part in model.base_model.modules():
        if isinstance(part, nn.ModuleList) and len(part) == depth:
            return part
    raise ModelError(f"{type(model).__name__}: its layers are in no list of {depth}; set {remedy}")


def add_adapters(model: PreTrainedModel, config: AdapterConfig, *, seed: int) -> None:
    """Put LoRA beside linear layers of the trunk, in place, and freeze the rest of it; `config` says about embeddings and output head.

    A score head stays trainable.

    Raises ModelError when one of `config.targets` is no linear layer of the trunk, or it has none.
    """
    trunk = model.base_model
    linear = [name for name, part in trunk.named_modules() if isinstance(part, nn.Linear)]
    there = sorted({_last_part(name) for name in linear})
    unknown = [target for target in config.targets if target not in there]
    if not linear:
        raise ModelError(f"lora: {type(model).__name__} has no linear layers to put adapters beside: leave lora out, or set freeze_layers")
    if unknown:
        raise ModelError(
            f"lora.targets: no linear layer is called {', '.join(unknown)}; there are {', '.join(there)}: name some of these, "
            "or leave lora.targets out"
        )
    chosen = [name for name in linear if not config.targets or _last_part(name) in config.targets]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lora = LoraConfig(r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=chosen)
        inject_adapter_in_model(lora, trunk, ADAPTER)
    for part in (trunk.get_input_embeddings(), model.get_output_embeddings()):
        if part is not None:
            part.requires_grad_(config.embeddings)


def _last_part(name: str) -> str:
    return name.rpartition(".")[2]


def merged_state(model: PreTrainedModel) -> dict[str, torch.Tensor] | None:
    """What to save of a model with adapters: its weights under their own names, each adapter added to what it stands beside.

    The model itself stays as it is. None for a model without adapters, whose own state is what to save.
    """
    scales = {part.scaling[ADAPTER] for part in model.modules() if isinstance(part, LoraLayer)}
    if not scales:
        return None
    (scale,) = scales
    return dict(merged_weights(model.state_dict().items(), scale))
