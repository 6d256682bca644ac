"""Model folders in another shape: weights recast, split into files of a size, adapters merged, scalar heads left out.

Everything is written under a temporary name beside its target and renamed when it is complete.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from app.durable import sync, sync_tree
from app.errors import ConfigError, ModelError, first_line
from app.models.load import DTYPES, check_model_folder, load_tokenizer
from app.models.saving import save_folder
from app.planning.shapes import stored_json

ADAPTER_FILE = "adapter_config.json"
CLASSIFIER = "ForSequenceClassification"
HEADS = ("v_head", "value_head", "score", "classifier")
"""First parts of the names of scalar heads' weights: trlx, TRL and transformers."""
SHOWN = 3


@dataclass(frozen=True)
class Shape:
    """dtype: None keeps the one that is stored; shard_size: of a weight file at most, such as `10GB`; drop_heads: without scalar heads."""

    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    shard_size: str = "10GB"
    drop_heads: bool = False
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Loaded:
    """What is to be written."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load_for_export(path: str, shape: Shape, weights: Callable[[], Mapping[str, torch.Tensor]] | None = None) -> Loaded:
    """A causal language model, reward model or adapter (merged into its base), all weights accounted for.

    weights: gives those to put in place of a causal language model's own. A reward model without its head is its bare trunk.
    Raises ModelError for a folder that lacks weights, or has some that the model would not take.
    """
    if (Path(path).expanduser() / ADAPTER_FILE).is_file():
        return Loaded(_merged(path, shape), _adapters_tokenizer(path, shape))
    check_model_folder(path, chat_template=False)
    if weights is None:
        model = _load(path, shape, shape.dtype)
    else:
        model = _load(path, shape, "fp32")
        try:
            model.load_state_dict(dict(weights()))
        except RuntimeError as error:
            raise ModelError(f"the checkpoint's weights do not fit the model {path} ({first_line(error)})") from error
        _cast(model, path, shape)
    return Loaded(model, load_tokenizer(path, shape.trust_remote_code))


def require_free(folder: Path) -> None:
    """Raises ConfigError unless `folder` can become an export: it is not there, or empty."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(f"{folder} is {'not empty' if folder.is_dir() else 'a file'}: nothing is overwritten, choose another --output")


def write_export(loaded: Loaded, folder: Path, shape: Shape) -> list[Path]:
    """Write model, generation config, tokenizer and chat template; returns the weight files. Raises ConfigError and ModelError."""
    require_free(folder)
    temporary = folder.with_name(f".{folder.name}.exporting")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        save_folder(temporary, loaded.model, loaded.tokenizer, max_shard_size=shape.shard_size)
        sync_tree(temporary)
        temporary.rename(folder)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: cannot be written ({first_line(error)})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync(folder.parent)
    return sorted(folder.glob("*.safetensors"))


def _load(path: str, shape: Shape, dtype: str | None) -> PreTrainedModel:
    config = _config(path, shape)
    is_classifier = any(name.endswith(CLASSIFIER) for name in config.architectures or [])
    auto: Any = AutoModelForCausalLM
    if is_classifier:
        auto = AutoModel if shape.drop_heads else AutoModelForSequenceClassification
        if shape.drop_heads:
            config.num_labels = 2  # transformers' default
            vars(config).pop("reward_offset", None)
    try:
        model, report = auto.from_pretrained(
            path,
            config=config,
            dtype=DTYPES[dtype] if dtype else "auto",
            trust_remote_code=shape.trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"model {path}: cannot be loaded ({first_line(error)}); check the folder") from error
    if report["missing_keys"]:
        raise ModelError(f"model {path}: no weights for {_some(report['missing_keys'])}; give a folder with the whole model")
    _account_for(path, report["unexpected_keys"], drop_heads=shape.drop_heads)
    return model.eval()


def _account_for(path: str, unexpected: set[str] | list[str], *, drop_heads: bool) -> None:
    """Refuse to lose weights silently."""
    heads = [name for name in unexpected if name.split(".")[0] in HEADS]
    others = set(unexpected) - set(heads)
    if others:
        raise ModelError(f"model {path}: its architecture has no place for the weights {_some(others)}; correct its config.json")
    if heads and not drop_heads:
        raise ModelError(f"model {path}: has a scalar head ({_some(heads)}) beside the language model; leave it out with --drop-heads")


def _merged(path: str, shape: Shape) -> PreTrainedModel:
    """The base of an adapter with the adapter added to its weights, computed in float32."""
    from peft import PeftModel

    settings = stored_json(Path(path).expanduser() / ADAPTER_FILE)
    base = settings.get("base_model_name_or_path")
    if not base:
        raise ModelError(f"adapter {path}: its {ADAPTER_FILE} names no base_model_name_or_path; add the base model's folder or hub name")
    check_model_folder(base, chat_template=False)
    model = _load(base, shape, "fp32")
    try:
        merged: PreTrainedModel = PeftModel.from_pretrained(model, path).merge_and_unload()
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError) as error:
        raise ModelError(f"adapter {path}: cannot be merged into {base} ({first_line(error)})") from error
    _cast(merged, base, shape)
    return merged


def _cast(model: PreTrainedModel, origin: str, shape: Shape) -> None:
    """In place, from float32 to what is asked for, else to what `origin` stores."""
    torch.nn.Module.to(model, DTYPES[shape.dtype] if shape.dtype else _config(origin, shape).dtype or torch.float32)


def _adapters_tokenizer(path: str, shape: Shape) -> PreTrainedTokenizerBase:
    """The adapter's own tokenizer where it has one, else its base's."""
    own = any((Path(path).expanduser() / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))
    base = stored_json(Path(path).expanduser() / ADAPTER_FILE)["base_model_name_or_path"]
    return load_tokenizer(path if own else base, shape.trust_remote_code)


def _config(path: str, shape: Shape) -> Any:
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=shape.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"model {path}: its config cannot be read ({first_line(error)}); check the folder") from error


def _some(names: set[str] | list[str]) -> str:
    return ", ".join(sorted(names)[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
