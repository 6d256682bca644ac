"""Tokenizers that do not name their special tokens, and what their family's name gives them."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from app.data.templates import OASST_TOKENS, build_template, prepare_tokenizer
from app.data.tokenizer_families import FAMILIES, family_of
from app.errors import ModelError
from app.formats.records import Message
from tests.tiny_models import bytes_backend


def nameless(path: str, *special: str, **named: str) -> PreTrainedTokenizerFast:
    """A tokenizer whose vocabulary begins with `special` but which declares only what is `named`."""
    return PreTrainedTokenizerFast(tokenizer_object=bytes_backend(*special), name_or_path=path, **named)


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("EleutherAI/pythia-12b-deduped", "pythia"),
        ("EleutherAI/gpt-neox-20b", "gpt-neox"),
        ("huggyllama/llama-7b", "llama"),
        ("conceptofmind/LLongMA-2-13b", "llongma"),
        ("facebook/galactica-125m", "galactica"),
        ("Salesforce/codegen-2B-multi", "codegen"),
        ("cerebras/Cerebras-GPT-13B", "cerebras"),
        ("tiiuae/falcon-7b", "falcon"),
        ("bigscience/bloom-560m/", "bloom"),
        ("microsoft/deberta-v3-large", "deberta-v3"),
        ("google/electra-large-discriminator", "electra"),
        ("togethercomputer/GPT-JT-6B-v1", "gpt-jt"),
    ],
)
def test_names_tell_the_family(name: str, family: str) -> None:
    assert family_of(name) is FAMILIES[family]


@pytest.mark.parametrize("name", ["", "HuggingFaceTB/SmolLM2-135M", "pythia/base", "llama-as-falcon"])
def test_other_names_tell_none(name: str) -> None:
    assert family_of(name) is None


@pytest.mark.parametrize("part", FAMILIES)
def test_each_family_gives_what_its_tokenizer_lacks(part: str) -> None:
    """The tokens become special ones under their old ids; where a family pads with eos, a padding token of its own is added."""
    family = FAMILIES[part]
    own = list(dict.fromkeys(token for token in family if token))
    eos = family.eos or "<|endoftext|>"
    vocabulary = own if eos in own else [*own, eos]
    tokenizer = nameless(f"models/{part}-1b", *vocabulary, **({} if family.eos else {"eos_token": eos}))
    distinct = family.pad is not None and family.pad != eos
    assert prepare_tokenizer(tokenizer, oasst=True) == len(OASST_TOKENS) + (not distinct)
    assert tokenizer.eos_token == eos
    assert tokenizer.sep_token == family.sep
    assert tokenizer.pad_token == (family.pad if distinct else "<|padding|>")
    template = build_template("oasst", tokenizer)
    assert template.pad_id != template.eos_id == vocabulary.index(eos)
    ids, _ = template.encode([Message("user", "Hi")], open_assistant=True)
    assert ids == [tokenizer.convert_tokens_to_ids(token) for token in ("<|prompter|>", "H", "i", eos, "<|assistant|>")]


def test_what_a_tokenizer_names_itself_stays() -> None:
    tokenizer = nameless("org/pythia-chat", "<|endoftext|>", "<|im_end|>", "<|padding|>", "[P]", eos_token="<|im_end|>", pad_token="[P]")
    prepare_tokenizer(tokenizer, oasst=True)
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.sep_token) == ("<|im_end|>", "[P]", "<|endoftext|>")


def test_a_family_gives_nothing_that_the_vocabulary_lacks() -> None:
    tokenizer = nameless("org/llama-3-8b", "<|end_of_text|>")
    with pytest.raises(ModelError, match=r"org/llama-3-8b: no eos token.*pythia"):
        prepare_tokenizer(tokenizer, oasst=True)


@pytest.mark.parametrize("oasst", [True, False])
def test_ids_of_added_tokens_are_the_same_every_time(oasst: bool) -> None:
    first, second = (nameless("org/galactica", "<pad>", "</s>") for _ in range(2))
    assert prepare_tokenizer(first, oasst=oasst) == prepare_tokenizer(second, oasst=oasst)
    assert first.get_vocab() == second.get_vocab()
    assert prepare_tokenizer(first, oasst=oasst) == 0
    assert first.get_vocab() == second.get_vocab()
