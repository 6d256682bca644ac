"""Model folders small enough to build in a test: random weights, byte-level tokenizer, chat template."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    BertConfig,
    BertForMaskedLM,
    ElectraConfig,
    ElectraForPreTraining,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from app.models.heads import init_reward_model, save_reward_model

PAD, END, PROMPTER, ASSISTANT = "<|padding|>", "<|endoftext|>", "<|prompter|>", "<|assistant|>"
SPECIAL = (PAD, END, PROMPTER, ASSISTANT)
VOCABULARY = 256 + len(SPECIAL)
CONTEXT = 128
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ ('<|prompter|>' if message.role == 'user' else '<|assistant|>') + message.content + '<|endoftext|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def bytes_backend(*special: str) -> Tokenizer:
    """One token per byte behind `special`, which are ordinary entries of the vocabulary until someone declares them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={token: index for index, token in enumerate([*special, *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def make_chatml_tokenizer() -> PreTrainedTokenizerFast:
    """The ids of `make_tokenizer`, ChatML's tokens in place of the roles (ids 2 and 3), and a system turn of its own."""
    tokens = {"pad_token": PAD, "eos_token": "<|im_end|>", "additional_special_tokens": [END, "<|im_start|>"]}
    backend = bytes_backend(PAD, END, "<|im_start|>", "<|im_end|>")
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHATML, **tokens)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte (ids 4..259) behind the special tokens (ids 0..3)."""
    return PreTrainedTokenizerFast(
        tokenizer_object=bytes_backend(*SPECIAL),
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[PROMPTER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
    )


def make_neox(folder: Path, *, seed: int = 0) -> str:
    """A GPT-NeoX causal LM with untied embeddings and, in its config, dropout."""
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.2,
        hidden_dropout=0.1,
        attention_dropout=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    torch.manual_seed(seed)
    return _save(GPTNeoXForCausalLM(config), folder)


def make_llama(folder: Path, *, seed: int = 0, context: int = CONTEXT) -> str:
    """A Llama causal LM with tied embeddings and grouped-query attention."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=context,
        initializer_range=0.2,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    torch.manual_seed(seed)
    return _save(LlamaForCausalLM(config), folder)


ENCODER_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}


def make_bert(folder: Path, *, seed: int = 0) -> str:
    """A BERT masked LM, which has no pooler; with dropout in its config."""
    torch.manual_seed(seed)
    return _save(BertForMaskedLM(BertConfig(**ENCODER_SHAPE)), folder)


def make_electra(folder: Path, *, seed: int = 0) -> str:
    """An ELECTRA discriminator with narrower embeddings; with dropout in its config."""
    torch.manual_seed(seed)
    return _save(ElectraForPreTraining(ElectraConfig(**ENCODER_SHAPE, embedding_size=16)), folder)


def make_reward_model(folder: Path, causal_lm: str, *, seed: int = 0, reward_offset: float = 0.0) -> str:
    """A reward model with a fresh head on the trunk of a causal LM's folder."""
    save_reward_model(init_reward_model(causal_lm, seed=seed), make_tokenizer(), folder, reward_offset)
    return str(folder)


def make_foreign_reward_model(folder: Path, *, context: int = 1024) -> str:
    """A reward model that somebody else has trained: a tokenizer with ChatML's template, and a config without a word of ours."""
    model = init_reward_model(make_llama(folder / "trunk", context=context), seed=3)
    del model.config.reward_offset, model.config.pooling
    save_reward_model(model, make_chatml_tokenizer(), folder / "model", None)
    return str(folder / "model")


def _save(model: PreTrainedModel, folder: Path) -> str:
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)
