"""The embedded model: a small GPT-NeoX (Pythia architecture) from its config, and a byte-level BPE tokenizer trained on the corpus."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from app.data.templates import OASST_CHAT_TEMPLATE, OASST_TOKENS
from app.models.context import EMBEDDED_CONTEXT
from app.models.saving import save_folder

EOS, PAD = "<|endoftext|>", "<|padding|>"
VOCABULARY = 1024
LAYERS, HIDDEN, HEADS = 4, 192, 3
"""1.9 M parameters on the embedded corpus. Two layers are the least that can compare an answer with its prompt, and learn soonest."""
INITIALIZER_RANGE = 0.06
"""About 1 / sqrt(HIDDEN). The usual 0.02 suits wide models; here it would leave attention uniform for hundreds of steps."""
EMBEDDING_MULTIPLE = 16
"""Embedding rows are rounded up to a multiple of this, as Open-Assistant does."""


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with at most `VOCABULARY` tokens; ids 0.. are <|endoftext|>, <|padding|> and the role tokens, in fixed order.

    The same texts in the same order give the same tokenizer.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[EOS, PAD, *OASST_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=EOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=list(OASST_TOKENS),
        model_max_length=EMBEDDED_CONTEXT,
    )
    tokenizer.chat_template = OASST_CHAT_TEMPLATE
    return tokenizer


def build_config(vocabulary: int, *, eos_id: int, pad_id: int) -> GPTNeoXConfig:
    """The architecture; no dropout, because PPO compares log-probs of the same weights."""
    rows = -(-vocabulary // EMBEDDING_MULTIPLE) * EMBEDDING_MULTIPLE
    return GPTNeoXConfig(
        vocab_size=rows,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=4 * HIDDEN,
        max_position_embeddings=EMBEDDED_CONTEXT,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        classifier_dropout=0.0,
        initializer_range=INITIALIZER_RANGE,
        tie_word_embeddings=False,
        bos_token_id=eos_id,
        eos_token_id=eos_id,
        pad_token_id=pad_id,
    )


def build_embedded(folder: Path, *, texts: Iterable[str], seed: int) -> Path:
    """Write tokenizer and freshly initialised model as a Hugging Face folder; the same texts and seed give the same bytes."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    tokenizer = train_tokenizer(texts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPTNeoXForCausalLM(build_config(len(tokenizer), eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id))
    save_folder(temporary, model, tokenizer)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
    return folder
