"""Replies as the models that judge them read them: by their own tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from app.data.encoding import join_reply, kept_of_reply
from app.data.templates import Template, build_template
from app.experience import FinishReason, IntArray, Rollout
from app.formats.records import Message
from app.models.context import context_of
from app.models.heads import has_reward_offset
from app.models.load import load_tokenizer

UNLIMITED = 2**31 - 1


@dataclass(frozen=True)
class EncodedReply:
    """A reply behind its conversation. ids: int32 [s]; reply_tokens: the last of them, its end token among them, are the reply's."""

    ids: IntArray
    reply_tokens: int
    truncated: bool


@dataclass(frozen=True)
class ReplyEncoder:
    """Writes replies behind their conversations, at most `max_length` tokens, cut as `app.data.encoding` says.

    A model of `corral rm` has learnt to read its score at the end token, which is then the last. One from elsewhere is given the whole of
    what its chat template writes, as its authors do it (`whole`): ChatML's, for one, goes on with a line break, where it reads its score.
    """

    template: Template
    max_length: int
    whole: bool = False

    @classmethod
    def of(
        cls, path: str, template: Literal["auto", "oasst", "chat"] = "auto", max_length: int = UNLIMITED, *, trust_remote_code: bool = False
    ) -> ReplyEncoder:
        """With the tokenizer of a model folder. Raises ModelError where it has no such template."""
        tokenizer = load_tokenizer(path, trust_remote_code)
        return cls(build_template(template, tokenizer), max_length, not has_reward_offset(path, trust_remote_code))

    def encode(self, conversation: Sequence[Message], texts: Sequence[str], *, finished: bool = True) -> list[EncodedReply]:
        """Each text as a reply to a conversation that ends in a user turn; without `finished` nothing follows the text."""
        if self.whole:
            return [self._join(*self._rendered(conversation, text), finished=finished) for text in texts]
        prompt, _ = self.template.encode(conversation, open_assistant=True)
        return [self._join(prompt, self.template.encode_text(text), [self.template.eos_id], finished=finished) for text in texts]

    def _rendered(self, conversation: Sequence[Message], text: str) -> tuple[list[int], list[int], list[int]]:
        """What stands before the reply, the reply, and what follows it: the end token first."""
        ids, trained = self.template.encode([*conversation, Message("assistant", text)], open_assistant=False)
        end = len(trained) - 1 - trained[::-1].index(True)  # of the reply: its end token
        begin = end - len(self.template.encode_text(text))
        return ids[:begin], ids[begin:end], ids[end:]

    def _join(self, prompt: Sequence[int], reply: Sequence[int], ending: Sequence[int], *, finished: bool) -> EncodedReply:
        ending = ending if finished else ()
        ids = join_reply(prompt, reply, ending, self.max_length)
        kept = kept_of_reply(prompt, reply, ending, self.max_length) + len(ending)
        return EncodedReply(ids, kept, len(prompt) + len(reply) + len(ending) > self.max_length)


@dataclass(frozen=True)
class Rewriter:
    """Rollouts for a reward model whose tokenizer is not the policy's: their text, written once more. decode: the policy's, of response
    ids. A conversation that is longer than the model's context loses its oldest tokens."""

    encoder: ReplyEncoder
    decode: Callable[[IntArray], str]

    @classmethod
    def of(cls, path: str, decode: Callable[[IntArray], str], *, trust_remote_code: bool = False) -> Rewriter:
        """For the reward model in a folder. Raises ModelError where it has no chat template."""
        context = context_of(path) or UNLIMITED
        return cls(ReplyEncoder.of(path, max_length=context, trust_remote_code=trust_remote_code), decode)

    def __call__(self, rollout: Rollout) -> IntArray:
        """Prompt and response in the model's own token ids, int32 [s]. Raises ModelError where its template refuses the conversation."""
        conversation = [Message.of(message) for message in rollout.prompt.messages]
        finished = rollout.finish is FinishReason.STOP
        (encoded,) = self.encoder.encode(conversation, [self.decode(rollout.ids)], finished=finished)
        return encoded.ids
