"""Scalar heads: reward models (one score per sequence) and critics (one value per token).

Reward models are Hugging Face sequence-classification models with one label whose config carries `reward_offset`: the
mean raw score of the SFT model's own answers. Whoever reports a score reports `logit - reward_offset`.

A decoder's `score` head reads the last attended token or, where its config says `pooling = "mean"`, the mean hidden state of
all attended tokens. Plain transformers does not know that key: it reads the last token of such a folder too, and is wrong.
Any other architecture (BERT, ELECTRA, DeBERTa) scores by its own classification head.
Shape legend: B sequences, S tokens, H hidden size. Rows are told apart from padding by the attention mask alone.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from app.data.templates import OASST_CHAT_TEMPLATE, OASST_TOKENS
from app.errors import ModelError, first_line
from app.models.forward import hidden_states
from app.models.load import DTYPES, check_model_folder, load_config, load_tokenizer
from app.models.open_assistant import OpenAssistantConfig, load_open_assistant
from app.models.packed import PackedRow, packed_hidden_states
from app.models.saving import save_folder
from app.models.trainable import merged_state

Pooling = Literal["last", "mean"]
Precision = Literal["fp32", "bf16", "fp16"]


def init_reward_model(path: str, *, seed: int, pooling: Pooling = "last", trust_remote_code: bool = False) -> PreTrainedModel:
    """A reward model, float32, to train: what stands in `path` decides how it begins.

    - A causal LM: its trunk, and a `score` head drawn from N(0, 1/sqrt(H + 1)).
    - An encoder: its trunk, and its own classification head, drawn as the architecture does.
    - A reward model: as it is, without its reward_offset; its pooling must be the one asked for.

    `config.pad_token_id` becomes a token that never ends an answer, since plain transformers reads the score at the last
    token that is not padding. Raises ModelError, also when the tokenizer has no such token.
    """
    config = load_config(path, trust_remote_code)
    tokenizer = load_tokenizer(path, trust_remote_code)
    config.get_text_config().pad_token_id = _padding_token(tokenizer, config, path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, missing = _load_classifier(path, config, "fp32", trust_remote_code)
    _refuse_missing([name for name in missing if not _of_head(name, model)], path)
    if not has_score_head(model):
        if pooling != "last":
            raise ModelError(f"rm.pooling = {pooling}: {type(model).__name__} scores by its own head; set rm.pooling = last")
    elif missing:
        head = _score_head(model)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            head.weight.normal_(0.0, 1 / math.sqrt(head.in_features + 1), generator=generator)
        model.config.pooling = pooling
    elif pooling_of(model) != pooling:
        raise ModelError(f"{path}: its score head was trained with pooling = {pooling_of(model)}; set rm.pooling = {pooling_of(model)}")
    model.config.reward_offset = 0.0
    return model.eval()


def load_reward_model(path: str, *, precision: Precision = "fp32", trust_remote_code: bool = False) -> PreTrainedModel:
    """A reward-model folder, ready to score. Raises ModelError when it is none, or lacks weights.

    One of Open-Assistant's (see `app.models.open_assistant`) becomes what `convert_reward_model` would write.
    """
    config = _reward_model_config(path, trust_remote_code)
    model, missing = _load_classifier(path, config, precision, trust_remote_code)
    _refuse_missing(missing, path)
    pooling_of(model)
    return model.eval()


def check_reward_model(path: str, trust_remote_code: bool = False) -> None:
    """Raises ModelError, before any weight is loaded, for a folder that is no reward model or not whole."""
    check_model_folder(path, chat_template=False)
    _reward_model_config(path, trust_remote_code)


def _reward_model_config(path: str, trust_remote_code: bool) -> PretrainedConfig:
    config = load_config(path, trust_remote_code)
    if not isinstance(config, OpenAssistantConfig) and config.num_labels != 1:
        raise ModelError(f"{path}: a reward model has one label, this one has {config.num_labels}; give a folder written by `corral rm`")
    return config


def convert_reward_model(path: str, folder: str | Path, *, precision: Precision = "fp32", trust_remote_code: bool = False) -> None:
    """Write any reward-model folder that can be loaded as an ordinary one (see `save_reward_model`) with the same scores.

    A tokenizer with Open-Assistant's role tokens and no chat template gets theirs. Raises ModelError.
    """
    model = load_reward_model(path, precision=precision, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(path, trust_remote_code)
    model.config.get_text_config().pad_token_id = _padding_token(tokenizer, model.config, path)
    if not tokenizer.chat_template and set(OASST_TOKENS[:3]) <= tokenizer.get_vocab().keys():
        tokenizer.chat_template = OASST_CHAT_TEMPLATE
    save_reward_model(model, tokenizer, folder, getattr(model.config, "reward_offset", None))


def save_reward_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path, reward_offset: float | None) -> None:
    """Write a folder that plain transformers loads: safetensors, config with `reward_offset` where it has one, tokenizer that pads as the
    model reads."""
    if reward_offset is not None:
        model.config.reward_offset = reward_offset
    padding = copy.deepcopy(tokenizer)
    padding.padding_side = "right"
    padding.pad_token = tokenizer.convert_ids_to_tokens(model.config.get_text_config().pad_token_id)
    save_folder(folder, model, padding, state_dict=merged_state(model))


def reward_offset(model: PreTrainedModel) -> float:
    """What is subtracted from every raw score of this model; 0 where its config has none."""
    return float(getattr(model.config, "reward_offset", 0.0))


def has_reward_offset(path: str, trust_remote_code: bool = False) -> bool:
    """Whether the config of a folder names one: `corral rm` has trained the model, or Open-Assistant."""
    config = load_config(path, trust_remote_code)
    return isinstance(config, OpenAssistantConfig) or hasattr(config, "reward_offset")


def pooling_of(model: PreTrainedModel) -> Pooling:
    """What a decoder's score head reads; "last" where its config does not say. Raises ModelError."""
    pooling = getattr(model.config, "pooling", "last") if has_score_head(model) else "last"
    if pooling not in ("last", "mean"):
        raise ModelError(f"{type(model).__name__}: pooling = {pooling!r} in its config.json is neither last nor mean")
    return cast(Pooling, pooling)


def sequence_scores(model: PreTrainedModel, ids_BS: torch.Tensor, attention_BS: torch.Tensor) -> torch.Tensor:
    """Raw logit of each row, float32 [B] (the offset is not subtracted), whichever way the rows are padded. Carries gradients."""
    if not has_score_head(model):
        return _own_head_scores(model, ids_BS, attention_BS)
    hidden_BSH = hidden_states(model.base_model, ids_BS, attention_BS)
    if pooling_of(model) == "mean":
        hidden_BH = _attended(hidden_BSH, attention_BS).sum(1) / attention_BS.sum(1, keepdim=True)
    else:
        tokens_S = torch.arange(ids_BS.shape[1], device=ids_BS.device)
        last_B = (tokens_S * attention_BS.long()).argmax(-1)
        hidden_BH = hidden_BSH[torch.arange(len(ids_BS), device=ids_BS.device), last_B]
    return _score_head(model)(hidden_BH.to(hidden_BSH.dtype)).squeeze(-1).float()


def packed_scores(model: PreTrainedModel, row: PackedRow) -> torch.Tensor:
    """Raw logit of each sequence of a row, float32 [B]; for models with a `score` head and attention by segment. Raises ModelError."""
    head, hidden_MH = _score_head(model), row.of_tokens(packed_hidden_states(model.base_model, row))
    if pooling_of(model) == "mean":
        hidden_BH = torch.stack([states.float().mean(0) for states in hidden_MH.split(row.lengths)])
    else:
        hidden_BH = hidden_MH[row.ends_B]
    return head(hidden_BH.to(hidden_MH.dtype)).squeeze(-1).float()


def _own_head_scores(model: PreTrainedModel, ids_BS: torch.Tensor, attention_BS: torch.Tensor) -> torch.Tensor:
    """By the model's own forward, float32 [B]. Rows are moved to the left first: an encoder counts its positions from there."""
    order_BS = (~attention_BS.bool()).long().argsort(dim=-1, stable=True)
    attention_BS = attention_BS.gather(1, order_BS)
    ids_BS = ids_BS.gather(1, order_BS).masked_fill(~attention_BS.bool(), model.config.get_text_config().pad_token_id or 0)
    return model(input_ids=ids_BS, attention_mask=attention_BS.long()).logits.squeeze(-1).float()


def _attended(hidden_BSH: torch.Tensor, attention_BS: torch.Tensor) -> torch.Tensor:
    """In float32, 0 on padding: a sum over many tokens in bfloat16 would lose digits."""
    return hidden_BSH.float().masked_fill(~attention_BS.bool()[..., None], 0.0)


class ScalarHead(nn.Linear):
    """H -> 1 with bias, computed in float32 whatever the precision of its weights (a value in bfloat16 has 3 digits)."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden.float(), self.weight.float(), self.bias.float()).squeeze(-1)


class ValueHead(nn.Module):
    """A critic on the states of another model: H -> 2 H -> ReLU -> 1 in float32, whatever the precision of its weights, as
    Open-Assistant's is. Starts with values of 0 everywhere; its inner layer, N(0, 1/sqrt(H)), depends on the seed alone."""

    def __init__(self, hidden_size: int, *, seed: int) -> None:
        super().__init__()
        self.inner = nn.Linear(hidden_size, 2 * hidden_size)
        self.outer = ScalarHead(2 * hidden_size, 1)
        with torch.no_grad():
            self.inner.weight.normal_(0.0, 1 / math.sqrt(hidden_size), generator=torch.Generator().manual_seed(seed))
        for zero in (self.inner.bias, self.outer.weight, self.outer.bias):
            nn.init.zeros_(zero)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Values float32 [...] of states [..., H]."""
        inner = nn.functional.linear(states.float(), self.inner.weight.float(), self.inner.bias.float())
        return self.outer(inner.relu())


class ValueModel(nn.Module):
    """A critic: a decoder's trunk and a scalar head on every token, or on the mean over it and all tokens before it."""

    def __init__(self, trunk: PreTrainedModel, pooling: Pooling = "last") -> None:
        super().__init__()
        self.trunk = trunk
        self.pooling = pooling
        self.head = ScalarHead(trunk.config.get_text_config().hidden_size, 1)

    @classmethod
    def from_reward_model(cls, path: str, *, trust_remote_code: bool = False) -> ValueModel:
        """Starts as the reward model: the value at a token is the score (logit - reward_offset) of the sequence that ends there.

        Raises ModelError where the reward model is no decoder with a linear `score` head: what an encoder computes at a token
        depends on the tokens behind it.
        """
        reward_model = load_reward_model(path, trust_remote_code=trust_remote_code)
        head = _score_head(reward_model)
        model = cls(cast(PreTrainedModel, reward_model.base_model), pooling_of(reward_model))
        with torch.no_grad():
            model.head.weight.copy_(head.weight)
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
        hidden_BSH = hidden_states(self.trunk, input_ids, attention_mask)
        if self.pooling == "mean":
            counts_BS = attention_mask.long().cumsum(1).clamp(min=1)
            hidden_BSH = _attended(hidden_BSH, attention_mask).cumsum(1) / counts_BS[..., None]
        return self.head(hidden_BSH)


def _load_classifier(
    path: str, config: PretrainedConfig, precision: Precision, trust_remote_code: bool
) -> tuple[PreTrainedModel, set[str]]:
    """A model with one label, and the names of its weights that the folder does not hold. Raises ModelError."""
    if isinstance(config, OpenAssistantConfig):
        return load_open_assistant(path, config, DTYPES[precision]), set()
    config.num_labels = 1
    options: dict[str, Any] = {"dtype": DTYPES[precision], "trust_remote_code": trust_remote_code}
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            path, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(f"{path}: no reward model can be made of it ({first_line(error)}); give another folder") from error
    return model, {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}


def has_score_head(model: PreTrainedModel) -> bool:
    """Whether scores come from a linear head over a decoder's states."""
    return isinstance(getattr(model, "score", None), nn.Linear)


def _of_head(name: str, model: PreTrainedModel) -> bool:
    """Whether a weight belongs to the classification head; an encoder's pooler does, wherever it stands."""
    if has_score_head(model):
        return name == "score.weight"
    return "pooler" in name or not name.startswith(f"{model.base_model_prefix}.")


def _score_head(model: PreTrainedModel) -> nn.Linear:
    if not has_score_head(model):
        raise ModelError(
            f"{type(model).__name__} has no linear `score` head over a decoder, so no critic can start from it: PPO needs a reward model "
            "trained from a decoder (GPT-NeoX, Llama, Mistral, Qwen and the like)"
        )
    return cast(nn.Linear, model.score)


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
