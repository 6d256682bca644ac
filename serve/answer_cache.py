"""Answers kept by content: the same sequence under the same weights is computed once."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from cachetools import LRUCache

from app.config.serving import Output
from app.experience import IntArray

Answer = np.ndarray[Any, np.dtype[Any]]
Key = tuple[str, Output, bytes]


class AnswerCache:
    """The last `entries` answers; 0 keeps none."""

    def __init__(self, entries: int) -> None:
        self._answers: LRUCache[Key, Answer] | None = LRUCache(entries) if entries else None

    def get(self, weights_hash: str, output: Output, ids: IntArray) -> Answer | None:
        """The answer to a sequence, where it is known."""
        return None if self._answers is None else self._answers.get(_key(weights_hash, output, ids))

    def put(self, weights_hash: str, output: Output, ids: IntArray, answer: Answer) -> None:
        """Keep a copy of an answer."""
        if self._answers is not None:
            self._answers[_key(weights_hash, output, ids)] = answer.copy()


def _key(weights_hash: str, output: Output, ids: IntArray) -> Key:
    return weights_hash, output, hashlib.blake2b(ids.tobytes(), digest_size=16).digest()
