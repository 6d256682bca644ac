"""Finding and loading causal language models: what `model.path` means, and folders checked before anything is loaded."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from httpx2 import HTTPError
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.constants import CONFIG_NAME
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from app.config.shared import ModelConfig
from app.data.templates import OASST_TOKENS, prepare_tokenizer
from app.errors import ModelError, first_line
from app.models.embedded import EMBEDDING_MULTIPLE, build_embedded
from app.models.gguf import PACKAGED, check_gguf, convert_gguf, packaged_gguf
from app.models.logits import learn_logits
from app.models.open_assistant import OpenAssistantConfig, load_open_assistant
from app.models.saving import save_folder
from app.planning.shapes import stored_json
from app.run_layout import BASE

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_WEIGHTS = ("*.safetensors", "*.bin")


def resolve_model(config: ModelConfig, *, texts: Iterable[str], seed: int, folder: Path, for_oasst: bool) -> str:
    """A folder (or hub name) that holds everything the stages need: weights, tokenizer, padding token, chat template.

    `embedded` is built under `folder` from `texts` and `seed`; GGUF is converted into the cache. A tokenizer without a chat
    template gets Open-Assistant's role tokens and template, and with `for_oasst` so does one that has its own; the completed
    copy is written under `folder`. Raises ModelError.
    """
    if config.path == "embedded":
        target = folder / "embedded"
        if not (target / "config.json").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            build_embedded(target, texts=texts, seed=seed)
        return str(target)
    if config.path == PACKAGED:
        path = str(convert_gguf(packaged_gguf()))
    elif config.path.endswith(".gguf"):
        path = str(convert_gguf(_existing(Path(config.path).expanduser())))
    else:
        check_model_folder(config.path, chat_template=False)
        path = seen_from_anywhere(config.path)
    return _complete(path, config, folder / BASE, for_oasst)


def check_convertible(path: str) -> None:
    """Raises ModelError where the packaged model or a GGUF file is not there, or cannot be read."""
    check_gguf(packaged_gguf() if path == PACKAGED else _existing(Path(path).expanduser()))


def seen_from_anywhere(path: str) -> str:
    """A local folder by its absolute path, because Ray's workers run in other directories; a hub name as it is."""
    local = Path(path).expanduser()
    return str(local.absolute()) if local.exists() else path


def _complete(path: str, config: ModelConfig, target: Path, for_oasst: bool) -> str:
    """`path` itself where its tokenizer has all it needs, else `target`: the same weights beside a completed tokenizer."""
    tokenizer = load_tokenizer(path, config.trust_remote_code)
    has_roles = all(token in tokenizer.get_vocab() for token in OASST_TOKENS)
    oasst = (for_oasst and not has_roles) or not tokenizer.chat_template
    if not oasst and tokenizer.pad_token_id not in (None, tokenizer.eos_token_id):
        return path
    added = prepare_tokenizer(tokenizer, oasst=oasst)
    rows = load_config(path, config.trust_remote_code).get_text_config().vocab_size
    if not oasst and not added:
        return path
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    if len(tokenizer) > rows or not Path(path).is_dir():
        model = _load_whole(path, config.precision, config.trust_remote_code)
        if len(tokenizer) > rows:
            model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=EMBEDDING_MULTIPLE)
        save_folder(target, model, tokenizer)
    else:
        for file in Path(path).resolve().iterdir():
            if file.is_file():
                os.symlink(file, target / file.name)
        for file in target.glob("*token*"):
            file.unlink()  # the completed tokenizer replaces these links, not what they point to
        tokenizer.save_pretrained(target)
    return str(target)


def _load_whole(path: str, precision: Literal["fp32", "bf16", "fp16"], trust_remote_code: bool) -> PreTrainedModel:
    """With all weights of the folder and no head that it lacks, so that saving the model copies the folder. Raises ModelError."""
    config = load_config(path, trust_remote_code)
    if isinstance(config, OpenAssistantConfig):
        return load_open_assistant(path, config, DTYPES[precision])
    classifier = _is_classifier(config.architectures)
    if not classifier and config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return load_causal_lm(path, precision, trust_remote_code)
    kind = AutoModelForSequenceClassification if classifier else AutoModel
    return kind.from_pretrained(path, config=config, dtype=DTYPES[precision], trust_remote_code=trust_remote_code)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ModelError(f"model.path = {path}: no such file; check the path (it is relative to {Path.cwd()})")
    return path


def check_model_folder(path: str | Path, *, chat_template: bool = True) -> None:
    """Raises ModelError, before anything is loaded, when a local folder lacks its config, weights, tokenizer or chat template.

    A name that can only be a hub repository passes; the hub is asked when it is loaded.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        if isinstance(path, str) and _HUB_NAME.fullmatch(path) and not folder.exists():
            return
        raise ModelError(f"model {path}: no such folder; check the path (it is relative to {Path.cwd()})")
    if not (folder / "config.json").is_file():
        raise ModelError(f"model {path}: no config.json; name a Hugging Face model folder")
    missing = _missing_weights(folder)
    if missing:
        raise ModelError(f"model {path}: no weights ({missing}); save the model with save_pretrained, or copy the folder again")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ModelError(f"model {path}: no tokenizer; save it there with tokenizer.save_pretrained({str(path)!r})")
    if chat_template and not _has_chat_template(folder):
        raise ModelError(f"model {path}: its tokenizer has no chat template; run `corral sft` on it first, or save one with it")


def check_language_model(path: str | Path, named: str = "model") -> None:
    """As `check_model_folder`, and also for a reward model or an encoder, whose missing output head would be drawn at random.

    named: what the path is, for the message."""
    check_model_folder(path)
    if not writes_text(path):
        raise ModelError(f"{named} {path}: a reward model or an encoder writes no answers; name a causal language model")


def is_encoder(path: str | Path) -> bool:
    """Whether the model reads a text from both sides (BERT, ELECTRA, DeBERTa): it writes none, and no critic can start from it."""
    return _stored_config(path).get("model_type") in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def writes_text(path: str | Path) -> bool:
    """Whether the model may be a language model that answers: it is neither a reward model nor an encoder."""
    return not scores_text(path) and not is_encoder(path)


def scores_text(path: str | Path) -> bool:
    """Whether the model is a reward model, as its config says."""
    config = _stored_config(path)
    return config.get("model_type") == OpenAssistantConfig.model_type or _is_classifier(config.get("architectures"))


def has_output_head(path: str | Path) -> bool:
    """Whether the model's config says that it is a language model: nothing in its folder scores."""
    return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in _stored_config(path).get("architectures") or ())


def _is_classifier(architectures: list[str] | None) -> bool:
    return any(name.endswith("ForSequenceClassification") for name in architectures or ())


def _stored_config(path: str | Path) -> dict[str, Any]:
    """What config.json says, by which no code of the folder is run."""
    if not Path(path).expanduser().is_dir():
        _ask_hub(str(path))
    try:
        config: dict[str, Any] = PretrainedConfig.get_config_dict(str(path))[0]
    except (OSError, ValueError) as error:
        raise ModelError(f"model {path}: its config cannot be read ({first_line(error)}); check model.path or the network") from error
    return config


def _ask_hub(name: str) -> None:
    """Raises ModelError at once for a model that is neither in the hub's cache nor on the hub, or where that cannot be reached:
    Transformers itself goes on trying for half a minute."""
    if isinstance(try_to_load_from_cache(name, CONFIG_NAME), str):
        return
    try:
        get_hf_file_metadata(hf_hub_url(name, CONFIG_NAME))
    except (OSError, HTTPError) as error:
        raise ModelError(
            f"model {name}: no such folder, and not to be had from the Hugging Face hub ({first_line(error)}); "
            "check the path or the network"
        ) from error


def _missing_weights(folder: Path) -> str | None:
    """What is missing: a shard named by the index, or any weights at all."""
    for index in folder.glob("*.index.json"):
        shards = stored_json(index).get("weight_map")
        if not isinstance(shards, dict):
            return f"{index.name} has no weight_map"
        absent = sorted(shard for shard in set(shards.values()) if not (folder / shard).is_file())
        if absent:
            return f"{absent[0]} is missing"
    if not any(file.is_file() for pattern in _WEIGHTS for file in folder.glob(pattern)):
        return "no *.safetensors file"
    return None


def _has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    settings = folder / "tokenizer_config.json"
    return settings.is_file() and bool(stored_json(settings).get("chat_template"))


def load_tokenizer(path: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Raises ModelError when there is no usable tokenizer."""
    try:
        return AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"model {path}: its tokenizer cannot be loaded ({first_line(error)}); check model.path or the network") from error


def load_config(path: str | Path, trust_remote_code: bool = False) -> PretrainedConfig:
    """The model's config with every dropout set to 0. Raises ModelError."""
    try:
        config = AutoConfig.from_pretrained(str(path), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"model {path}: its config cannot be read ({first_line(error)}); check model.path or the network") from error
    if getattr(config.get_text_config(), "attn_logit_softcapping", None):  # which torch's own attention would leave out, silently
        config._attn_implementation = "eager"
    return without_dropout(config)


def load_causal_lm(
    path: str | Path, precision: Literal["fp32", "bf16", "fp16"] = "fp32", trust_remote_code: bool = False
) -> PreTrainedModel:
    """A causal language model whose dropouts are all 0, so that training mode and evaluation mode compute the same. Raises ModelError,
    also for an architecture whose logits are unknown to app.models.logits."""
    config = load_config(path, trust_remote_code)
    try:
        model = AutoModelForCausalLM.from_pretrained(str(path), config=config, dtype=DTYPES[precision], trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(f"model {path}: cannot be loaded ({first_line(error)}); check model.path or the network") from error
    learn_logits(model.eval())
    return model


def without_dropout(config: PretrainedConfig) -> PretrainedConfig:
    """Sets every dropout probability of a config to 0 (in place) and returns it."""
    for name, value in vars(config).items():
        if isinstance(value, float) and (name.endswith(("dropout", "_pdrop", "dropout_prob", "_drop"))):
            setattr(config, name, 0.0)
    return config
