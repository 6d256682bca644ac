"""Texts and conversations to token ids, as the served model's own tokenizer and chat template write them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import TypeVar

from app.errors import BadRequestError, ModelError
from app.formats.records import Message
from app.models.load import load_tokenizer
from app.models.replies import ReplyEncoder

KEPT = 8
"""Tokenizers in memory; of a model whose weights were swapped the old one goes."""

Conversation = Sequence[Mapping[str, str]]
"""Messages with `role` and `content`."""

T = TypeVar("T")


class Texts:
    """Tokenizers by folder, in one thread beside the event loop: a long text keeps nobody else waiting."""

    def __init__(self, trust_remote_code: bool) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer")
        self._tokenizer = lru_cache(KEPT)(partial(load_tokenizer, trust_remote_code=trust_remote_code))
        self._encoder = lru_cache(KEPT)(partial(ReplyEncoder.of, trust_remote_code=trust_remote_code))

    async def ids(self, path: str, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, special tokens in it recognised, as the tokenizer writes them by default. Raises BadRequestError."""
        return await self._beside(lambda: [list(self._tokenizer(path)(text)["input_ids"]) for text in texts])

    async def conversations(self, path: str, conversations: Sequence[Conversation]) -> list[list[int]]:
        """Ids of each conversation, rendered by the chat template, an answer at its end as `ReplyEncoder` writes it; no message can write
        a special token. Raises BadRequestError."""

        def encode(messages: Conversation) -> list[int]:
            encoder, turns = self._encoder(path), [Message.of(message) for message in messages]
            if len(turns) == 1 or turns[-1].role != "assistant":
                return encoder.template.encode(turns, open_assistant=False)[0]
            (encoded,) = encoder.encode(turns[:-1], [turns[-1].content])
            return encoded.ids.tolist()

        return await self._beside(lambda: [encode(messages) for messages in conversations])

    async def _beside(self, work: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except ModelError as error:
            raise BadRequestError(f"the text cannot be tokenised for this model: {error}; send token ids") from error
