"""Any conversation comes back from its tokens, and exactly the answers with their ends are learnt, in both templates."""

from __future__ import annotations

from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.data.templates import Template, build_template, prepare_tokenizer
from app.formats.records import Message
from tests.tiny_models import make_chatml_tokenizer, make_tokenizer

MARKUP = ("<|prompter|>", "<|assistant|>", "<|system|>", "<|endoftext|>", "<|padding|>", "<|im_start|>", "<|im_end|>", "</s>")
ODD = ("<|im_start|>assistant\n", "{{ eos_token }}", "{% raw %}", "\ue000\ue001", "\ue0001\ue001", "\r\n", " ", "e\u0301", "\U0001f600")
letters = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
texts = (
    st.lists(st.one_of(st.sampled_from([*MARKUP, *ODD, "a" * 5000]), st.text(letters, max_size=20)), min_size=1, max_size=6)
    .map("".join)
    .filter(bool)
)


def oasst() -> Template:
    tokenizer = make_tokenizer()
    prepare_tokenizer(tokenizer, oasst=True)
    return build_template("oasst", tokenizer)


TEMPLATES = {"oasst": oasst(), "chatml": build_template("chat", make_chatml_tokenizer())}
ROLES = {"system": "<|system|>", "user": "<|prompter|>", "assistant": "<|assistant|>"}


def written(kind: str, messages: list[Message], opened: bool) -> str:
    """What the tokens must spell, put together by hand."""
    if kind == "oasst":
        return "".join(f"{ROLES[m.role]}{m.content}<|endoftext|>" for m in messages) + "<|assistant|>" * opened
    default = "" if messages[0].role == "system" else "<|im_start|>system\nYou help.<|im_end|>\n"
    return default + "".join(f"<|im_start|>{m.role}\n{m.content}<|im_end|>\n" for m in messages) + "<|im_start|>assistant\n" * opened


@pytest.mark.parametrize("kind", TEMPLATES)
@settings(deadline=None, max_examples=150)
@given(contents=st.lists(texts, min_size=1, max_size=5), system=st.none() | texts, opened=st.booleans())
def test_round_trip(kind: str, contents: list[str], system: str | None, opened: bool) -> None:
    template = TEMPLATES[kind]
    turns = [Message("assistant" if number % 2 else "user", text) for number, text in enumerate(contents)]
    messages = [*([Message("system", system)] if system else []), *turns]
    ids, mask = template.encode(messages, open_assistant=opened)
    assert template.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) == written(kind, messages, opened)
    end = template.tokenizer.decode([template.eos_id])
    learnt = [
        template.tokenizer.decode([token for token, _ in run], clean_up_tokenization_spaces=False)
        for target, run in groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1])
        if target
    ]
    assert learnt == [message.content + end for message in turns if message.role == "assistant"]
    special = set(template.tokenizer.all_special_ids)
    plain = template.encode([Message(message.role, "x") for message in messages], open_assistant=opened)[0]
    assert [token for token in ids if token in special] == [token for token in plain if token in special]
