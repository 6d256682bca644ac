"""Which tokens end, pad and separate in the tokenizers that Open-Assistant trained with, for those that do not say so themselves."""

from __future__ import annotations

from typing import NamedTuple


class Family(NamedTuple):
    """None: the family has no such token of its own, or its tokenizers always name it."""

    pad: str | None = None
    eos: str | None = None
    sep: str | None = None


_GPT2 = Family("<|endoftext|>", "<|endoftext|>", "<|endoftext|>")
_NEOX = Family("<|padding|>", "<|endoftext|>", "<|endoftext|>")
_LLAMA = Family("</s>", "</s>", "<s>")
_BERT = Family("[PAD]", "[SEP]", "[CLS]")

FAMILIES: dict[str, Family] = {
    "pythia": _NEOX,
    "gpt-neox": _NEOX,
    "llama": _LLAMA,
    "llongma": _LLAMA,
    "galactica": Family("<pad>", "</s>"),
    "codegen": _GPT2,
    "cerebras": _GPT2,
    "falcon": _GPT2,
    "bloom": Family("<pad>", "</s>", "<s>"),
    "deberta-v3": _BERT,
    "electra": _BERT,
    "gpt-jt": Family(sep="<|extratoken_100|>"),
}
"""Part of a model's name, in lower case -> its family."""


def family_of(name: str) -> Family | None:
    """The family that the last part of a model's name or path tells; None where it tells none, or more than one.

    >>> family_of("EleutherAI/pythia-1.4b-deduped")
    Family(pad='<|padding|>', eos='<|endoftext|>', sep='<|endoftext|>')
    >>> family_of("pythia/my-model"), family_of("llama-or-falcon")
    (None, None)
    """
    last = name.rstrip("/").rpartition("/")[2].lower()
    found = {family for part, family in FAMILIES.items() if part in last}
    return found.pop() if len(found) == 1 else None
