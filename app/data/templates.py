"""Chat templates: messages to token ids with a loss mask.

`oasst` is Open-Assistant's format, `<|prompter|>TEXT<eos><|assistant|>TEXT<eos>...`, which `prepare_tokenizer` also gives the
tokenizer as a jinja template; `chat` is the tokenizer's own. Either way a conversation is rendered by jinja with a marker in
place of each text, so that what the template wrote and what people wrote are known apart: special tokens are recognised only
in the former, and a message that contains `<|assistant|>` is tokenised as those characters.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from app.data.tokenizer_families import FAMILIES, family_of
from app.errors import ModelError
from app.experience import IntArray
from app.formats.records import Message

OASST_TOKENS = ("<|prompter|>", "<|assistant|>", "<|system|>", "<|prefix_begin|>", "<|prefix_end|>")
"""Added in this order, so that ids never depend on hashing."""

OASST_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|prompter|>"
    "{% elif message['role'] == 'assistant' %}<|assistant|>"
    "{% else %}<|system|>{% endif %}"
    "{{ message['content'] }}{{ eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

PAD_TOKENS = ("<|padding|>", "<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>", "<|endoftext|>")
"""Tried in this order; the first that the tokenizer has and that ends no turn becomes the padding."""

_MARKER = re.compile("\ue000([0-9]+)\ue001")


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, *, oasst: bool) -> int:
    """Add what training needs and the tokenizer lacks: with `oasst` the role tokens and the chat template, and in any case the eos,
    separator and padding tokens of its family (which its name tells), and a padding token other than eos. What the tokenizer
    names itself stays. Returns how many tokens were added (the model's embeddings may have to grow).

    Where there is still no eos token, the separator ends a turn (encoders). Raises ModelError when the tokenizer has neither.
    """
    before = len(tokenizer)
    _complete_from_family(tokenizer)
    if not tokenizer.eos_token:
        tokenizer.eos_token = tokenizer.sep_token
    if not tokenizer.eos_token:
        raise ModelError(
            f"tokenizer {tokenizer.name_or_path}: no eos token, so answers could not end, and no known family by its name "
            f"({', '.join(FAMILIES)}); choose another model, or save the tokenizer with an eos token"
        )
    if oasst:
        tokenizer.add_special_tokens({"additional_special_tokens": list(OASST_TOKENS)}, replace_extra_special_tokens=False)
        tokenizer.chat_template = OASST_CHAT_TEMPLATE
    if not _set_padding(tokenizer, (tokenizer.eos_token_id,)):
        tokenizer.add_special_tokens({"pad_token": PAD_TOKENS[0]})
    return len(tokenizer) - before


def _complete_from_family(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the tokenizer those special tokens of its family that its vocabulary holds and it does not name itself."""
    family = family_of(tokenizer.name_or_path or "")
    vocabulary = tokenizer.get_vocab()
    for kind, token in (("eos_token", family.eos), ("sep_token", family.sep), ("pad_token", family.pad)) if family else ():
        if not getattr(tokenizer, kind) and token in vocabulary:
            tokenizer.add_special_tokens({kind: token})


def _set_padding(tokenizer: PreTrainedTokenizerBase, endings: Sequence[int]) -> bool:
    """Choose a padding token that ends no turn; False when the tokenizer has none."""
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in endings:
        return True
    vocabulary = tokenizer.get_vocab()
    for token in PAD_TOKENS:
        if vocabulary.get(token) is not None and vocabulary[token] not in endings:
            tokenizer.pad_token = token
            return True
    return False


@dataclass(frozen=True)
class Template:
    """Turns conversations into ids. `eos_id` ends an assistant turn (what a rollout stops at); `pad_id` is never `eos_id`."""

    name: Literal["oasst", "chat"]
    tokenizer: PreTrainedTokenizerBase
    eos_id: int
    pad_id: int

    def encode(self, messages: Sequence[Message], *, open_assistant: bool) -> tuple[list[int], list[bool]]:
        """Token ids and loss mask, both [S]; with `open_assistant` the ids end in the header of an assistant turn to come.

        loss_mask[i] is True where ids[i] is a target of SFT: the text of assistant turns and the token that ends them. Headers
        and system messages are none, wherever they stand. (Open-Assistant also learns the `<|prompter|>` that follows an answer,
        which no rollout ever needs, and, by a slip, leading system messages.) Raw text is written without any markup and learnt
        whole, with an end token behind it.
        """
        if messages[0].role == "text":
            text_ids = [*self.encode_text(messages[0].content), self.eos_id]
            return text_ids, [True] * len(text_ids)
        ids: list[int] = []
        loss_mask: list[bool] = []
        after_assistant = False
        for literal, message in self._segments(messages, open_assistant):
            if literal is not None:
                tokens = self._encode_literal(literal)
                trained = self._ending_length(tokens) if after_assistant else 0
                after_assistant = False
            else:
                assert message is not None
                tokens = self.encode_text(message.content)
                after_assistant = message.role == "assistant"
                trained = len(tokens) if after_assistant else 0
            ids += tokens
            loss_mask += [True] * trained + [False] * (len(tokens) - trained)
        return ids, loss_mask

    def encode_text(self, text: str) -> list[int]:
        """Ids of what a person or the model wrote; no special token can come out of it."""
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    def decode(self, ids: Sequence[int] | IntArray) -> str:
        """Text of a response, without special tokens."""
        return str(self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)).strip()

    def _segments(self, messages: Sequence[Message], open_assistant: bool) -> list[tuple[str | None, Message | None]]:
        """The rendered conversation as (literal, None) and (None, message) pieces in order."""
        marked = [{"role": message.role, "content": f"\ue000{index}\ue001"} for index, message in enumerate(messages)]
        pieces = _MARKER.split(_render(self.tokenizer, marked, open_assistant))
        if [int(index) for index in pieces[1::2]] != list(range(len(messages))):
            raise ModelError(
                f"tokenizer {self.tokenizer.name_or_path}: its chat template does not render every message once and in order; "
                "set data.template = 'oasst'"
            )
        out: list[tuple[str | None, Message | None]] = []
        for position, piece in enumerate(pieces):
            if position % 2:
                out.append((None, messages[int(piece)]))
            elif piece:
                out.append((piece, None))
        return out

    def _encode_literal(self, literal: str) -> list[int]:
        if literal not in self._literals:
            self._literals[literal] = list(self.tokenizer(literal, add_special_tokens=False)["input_ids"])
        return self._literals[literal]

    @cached_property
    def _literals(self) -> dict[str, list[int]]:
        return {}

    def _ending_length(self, literal: Sequence[int]) -> int:
        """Tokens up to and including the one that ends the turn."""
        return literal.index(self.eos_id) + 1 if self.eos_id in literal else 0


def build_template(name: Literal["auto", "oasst", "chat"], tokenizer: PreTrainedTokenizerBase) -> Template:
    """The template of a tokenizer; `auto` is `oasst` where the tokenizer has Open-Assistant's role tokens, else `chat`.

    Sets the tokenizer's padding token where it is missing or equal to eos. Raises ModelError when the tokenizer lacks the role
    tokens, a chat template or a padding token (`app.models.load.resolve_model` provides them).
    """
    vocabulary = tokenizer.get_vocab()
    has_roles = all(token in vocabulary for token in OASST_TOKENS[:3])
    if name == "auto":
        name = "oasst" if has_roles else "chat"
    if name == "oasst":
        if not has_roles:
            raise ModelError(
                f"tokenizer {tokenizer.name_or_path}: no token {OASST_TOKENS[0]}; start from a model trained with the oasst template"
            )
        tokenizer.chat_template = OASST_CHAT_TEMPLATE
    elif not tokenizer.chat_template:
        raise ModelError(f"tokenizer {tokenizer.name_or_path}: no chat template; set data.template = 'oasst' or choose a chat model")
    eos_id = _turn_ending(tokenizer)
    if not _set_padding(tokenizer, (eos_id,)):
        raise ModelError(f"tokenizer {tokenizer.name_or_path}: no padding token beside its end token; add one, such as {PAD_TOKENS[0]}")
    return Template(name, tokenizer, eos_id, int(tokenizer.pad_token_id))


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], open_assistant: bool) -> str:
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=open_assistant))
    except TemplateError as error:
        raise ModelError(f"tokenizer {tokenizer.name_or_path}: its chat template refuses the conversation ({error})") from error


def _turn_ending(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id of the first special token that the chat template writes after an assistant's text."""
    rendered = _render(tokenizer, [{"role": "user", "content": "\ue0000\ue001"}, {"role": "assistant", "content": "\ue0001\ue001"}], False)
    ending = tokenizer(_MARKER.split(rendered)[-1], add_special_tokens=False)["input_ids"]
    special = set(tokenizer.all_special_ids)
    found = next((int(token) for token in ending if token in special), None)
    if found is None:
        raise ModelError(
            f"tokenizer {tokenizer.name_or_path}: its chat template ends an assistant turn without a special token; "
            "set data.template = 'oasst'"
        )
    return found
