"""Model folders as they are written: one way for every stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase


def save_folder(folder: str | Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **options: Any) -> None:
    """Write weights, config, tokenizer and chat template, readable for whoever may read the config.

    options: those of `save_pretrained` of a model. (safetensors writes its files for their owner alone, whatever the umask.)
    """
    model.save_pretrained(folder, **options)
    mode = (Path(folder) / "config.json").stat().st_mode
    for weights in Path(folder).glob("*.safetensors"):
        weights.chmod(mode)
    tokenizer.save_pretrained(folder)
