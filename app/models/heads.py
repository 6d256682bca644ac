"""Scalar heads: reward models (one score per sequence) and critics (one value per token).

Reward models are Hugging Face sequence-classification models with one label whose config carries `reward_offset`: the
mean raw score of the SFT model's own answers. Whoever reports a score reports `logit - reward_offset`.
Shape legend: B sequences, S tokens, H hidden size. Rows are told apart from padding by the attention mask alone.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Literal, cast

import torch
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from app.errors import ModelError
from app.models.forward import hidden_states
from app.models.load import DTYPES, check_model_folder, load_config, load_tokenizer
from app.models.trainable import merged_state


def init_reward_model(sft_path: str, *, seed: int, trust_remote_code: bool = False) -> PreTrainedModel:
    """A reward model, float32, whose trunk is the causal LM in `sft_path` and whose head is drawn from N(0, 1/sqrt(H + 1)).

    `config.pad_token_id` becomes a token that never ends an answer, since plain transformers reads the score at the last
    token that is not padding. Raises ModelError when the tokenizer has no such token.
    """
    config = load_config(sft_path, trust_remote_code)
    config.num_labels = 1
    tokenizer = load_tokenizer(sft_path, trust_remote_code)
    config.get_text_config().pad_token_id = _padding_token(tokenizer, config, sft_path)
    model, report = AutoModelForSequenceClassification.from_pretrained(
        sft_path, config=config, dtype=torch.float32, trust_remote_code=trust_remote_code, output_loading_info=True
    )
    _refuse_missing([name for name in report["missing_keys"] if name != "score.weight"], sft_path)
    head = _score_head(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        head.weight.normal_(0.0, 1 / math.sqrt(head.in_features + 1), generator=generator)
    return model.eval()


def load_reward_model(
    path: str, *, precision: Literal["fp32", "bf16", "fp16"] = "fp32", trust_remote_code: bool = False
) -> PreTrainedModel:
    """A reward-model folder, ready to score. Raises ModelError when it is none, or lacks weights."""
    config = _reward_model_config(path, trust_remote_code)
    model, report = AutoModelForSequenceClassification.from_pretrained(
        path, config=config, dtype=DTYPES[precision], trust_remote_code=trust_remote_code, output_loading_info=True
    )
    _refuse_missing(report["missing_keys"], path)
    _score_head(model)
    return model.eval()


def check_reward_model(path: str, trust_remote_code: bool = False) -> None:
    """Raises ModelError, before any weight is loaded, for a folder that is no reward model or not whole."""
    check_model_folder(path)
    _reward_model_config(path, trust_remote_code)


def _reward_model_config(path: str, trust_remote_code: bool) -> PretrainedConfig:
    config = load_config(path, trust_remote_code)
    if config.num_labels != 1:
        raise ModelError(f"{path}: a reward model has one label, this one has {config.num_labels}; give a folder written by `corral rm`")
    return config


def save_reward_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path, reward_offset: float) -> None:
    """Write a folder that plain transformers loads: safetensors, config with `reward_offset`, tokenizer that pads as the model reads."""
    model.config.reward_offset = float(reward_offset)
    model.save_pretrained(folder, state_dict=merged_state(model))
    padding = copy.deepcopy(tokenizer)
    padding.padding_side = "right"
    padding.pad_token = tokenizer.convert_ids_to_tokens(model.config.get_text_config().pad_token_id)
    padding.save_pretrained(folder)


def reward_offset(model: PreTrainedModel) -> float:
    """What is subtracted from every raw score of this model; 0 where its config has none."""
    return float(getattr(model.config, "reward_offset", 0.0))


def sequence_scores(model: PreTrainedModel, ids_BS: torch.Tensor, attention_BS: torch.Tensor) -> torch.Tensor:
    """Raw logit at the last attended token of each row, float32 [B] (the offset is not subtracted). Carries gradients."""
    hidden_BSH = hidden_states(model.base_model, ids_BS, attention_BS)
    tokens_S = torch.arange(ids_BS.shape[1], device=ids_BS.device)
    last_B = (tokens_S * attention_BS.long()).argmax(-1)
    hidden_BH = hidden_BSH[torch.arange(len(ids_BS), device=ids_BS.device), last_B]
    return _score_head(model)(hidden_BH).squeeze(-1).float()


class ScalarHead(nn.Linear):
    """H -> 1 with bias, computed in float32 whatever the precision of its weights (a value in bfloat16 has 3 digits)."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden.float(), self.weight.float(), self.bias.float()).squeeze(-1)


class ValueModel(nn.Module):
    """A critic: a decoder's trunk and a scalar head on every token."""

    def __init__(self, trunk: PreTrainedModel) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = ScalarHead(trunk.config.get_text_config().hidden_size, 1)

    @classmethod
    def from_reward_model(cls, path: str, *, trust_remote_code: bool = False) -> ValueModel:
        """Starts as the reward model: the value at a sequence's last token is its score (logit - reward_offset)."""
        reward_model = load_reward_model(path, trust_remote_code=trust_remote_code)
        model = cls(cast(PreTrainedModel, reward_model.base_model))
        with torch.no_grad():
            model.head.weight.copy_(_score_head(reward_model).weight)
            model.head.bias.fill_(-reward_offset(reward_model))
        return model

    @classmethod
    def from_causal_lm(cls, path: str, *, trust_remote_code: bool = False) -> ValueModel:
        """Starts with values of 0 everywhere on the trunk of a causal LM."""
        config = load_config(path, trust_remote_code)
        trunk, report = AutoModel.from_pretrained(
            path, config=config, dtype=torch.float32, trust_remote_code=trust_remote_code, output_loading_info=True
        )
        _refuse_missing(report["missing_keys"], path)
        model = cls(trunk)
        nn.init.zeros_(model.head.weight)
        nn.init.zeros_(model.head.bias)
        return model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Values float32 [B, S]: entry t is the expected return of the state after tokens 0..t. Padding holds junk."""
        return self.head(hidden_states(self.trunk, input_ids, attention_mask))


def _score_head(model: PreTrainedModel) -> nn.Linear:
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear):
        raise ModelError(
            f"{type(model).__name__} has no linear `score` head over its last token: reward models are built from decoder models "
            "(GPT-NeoX, Llama, Mistral, Qwen and the like)"
        )
    return head


def _padding_token(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, path: str) -> int:
    """The tokenizer's padding token, or the first other special token that neither begins nor ends a turn."""
    ends = config.get_text_config().eos_token_id
    used = {tokenizer.eos_token_id, tokenizer.bos_token_id, *(ends if isinstance(ends, list) else [ends])}
    for token in (tokenizer.pad_token_id, tokenizer.unk_token_id, *tokenizer.all_special_ids):
        if token is not None and token not in used:
            return int(token)
    raise ModelError(
        f"{path}: the tokenizer has no padding token of its own (an answer ends with {tokenizer.eos_token!r}); "
        "set tokenizer.pad_token to another special token and save the folder again"
    )


def _refuse_missing(names: list[str] | set[str], path: str) -> None:
    if names:
        raise ModelError(f"{path}: no weights for {', '.join(sorted(names)[:5])}; give a folder with the whole model")
