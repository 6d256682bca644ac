"""What a replica of the scoring service computes: token ids in, floats out.

A request is one flat int32 array of token ids and the sequences' lengths. Requests of all callers share forward passes;
a request that cannot be computed is refused before it joins a batch, and a result that is not finite is an error.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedModel

from app.config.ppo import ScoringConfig
from app.config.shared import WorkersConfig
from app.errors import ScoringError
from app.experience import FloatArray, IntArray
from app.models.forward import pad_sequences, padded_batches, sequence_logprobs
from app.models.heads import load_reward_model, reward_offset, sequence_scores
from app.models.load import load_causal_lm
from serve.batching import Batcher

PASSES_PER_BATCH = 4
"""Callers share a batch of up to this many forward passes: enough to sort by length, short enough to answer soon."""

Precision = Literal["fp32", "bf16", "fp16"]


class SequenceReplica:
    """Batching, validation and counters around `forward`, which answers one padded batch."""

    def __init__(self, model: PreTrainedModel, name: str, config: ScoringConfig, workers: WorkersConfig) -> None:
        self._device = torch.device("cuda" if workers.gpus > 0 else "cpu")
        torch.nn.Module.to(model, self._device)  # in place
        self._model = model
        self._name = name
        self._max_batch_tokens = config.max_batch_tokens
        text_config = model.config.get_text_config()
        self._vocabulary: int = text_config.vocab_size
        self._context: int | None = getattr(text_config, "max_position_embeddings", None)
        self._counters: Counter[str] = Counter()
        self._batcher: Batcher[list[IntArray], FloatArray] = Batcher(
            self._compute,
            size=lambda sequences: sum(map(len, sequences)),
            limit=PASSES_PER_BATCH * config.max_batch_tokens,
            wait_seconds=config.batch_wait_seconds,
        )

    def forward(self, ids_BS: torch.Tensor, attention_BS: torch.Tensor) -> list[torch.Tensor]:
        """Answers of a padded batch, one float32 tensor [k_b] per row."""
        raise NotImplementedError

    async def answer(self, ids: IntArray, lengths: IntArray) -> FloatArray:
        """Answers of a request's sequences, concatenated, float32. Raises ScoringError for a request that is refused."""
        self._check(ids, lengths)
        answer = await self._batcher.submit(np.split(ids, np.cumsum(lengths)[:-1]))
        if not np.isfinite(answer).all():
            raise ScoringError(f"{self._name} computed NaN or infinity; check the model folder, or use model.precision = fp32")
        return answer

    async def stats(self) -> dict[str, int]:
        """Counters since the start of this replica, see `ServeScorer.stats`."""
        return {**self._counters, "pid": os.getpid()}

    def _check(self, ids: IntArray, lengths: IntArray) -> None:
        if not len(lengths) or int(lengths.sum()) != len(ids):
            raise ScoringError(f"lengths of {len(lengths)} sequences sum to {int(lengths.sum())}, but there are {len(ids)} ids")
        if lengths.min() < 1:
            raise ScoringError("a sequence is empty: every sequence needs at least one token")
        if self._context is not None and lengths.max() > self._context:
            raise ScoringError(f"a sequence has {lengths.max()} tokens, the {self._name} model's context is {self._context}: shorten it")
        if ids.min() < 0 or ids.max() >= self._vocabulary:
            raise ScoringError(
                f"token ids range from {ids.min()} to {ids.max()}, the {self._name} model's vocabulary is 0..{self._vocabulary - 1}: "
                "policy, reward model and reference must share one tokenizer"
            )

    @torch.inference_mode()
    def _compute(self, requests: Sequence[list[IntArray]]) -> list[FloatArray]:
        """All sequences of all requests in passes of similar length; one concatenated answer per request."""
        sequences = [sequence for request in requests for sequence in request]
        answers: dict[int, FloatArray] = {}
        for rows in padded_batches(sequences, self._max_batch_tokens):
            ids_BS, attention_BS = pad_sequences([sequences[row] for row in rows], self._device)
            for row, answer in zip(rows, self.forward(ids_BS, attention_BS), strict=True):
                answers[row] = answer.cpu().numpy()
            self._counters.update(passes=1, padded_tokens=ids_BS.numel())
        self._counters.update(batches=1, requests=len(requests), sequences=len(sequences), tokens=sum(map(len, sequences)))
        self._counters["largest_batch"] = max(self._counters["largest_batch"], len(requests))
        ordered = iter(range(len(sequences)))
        return [np.concatenate([answers[next(ordered)] for _ in request]) for request in requests]


class RewardReplica(SequenceReplica):
    """Scores: logit at the last token minus the model's `reward_offset`, one per sequence."""

    def __init__(self, path: str, config: ScoringConfig, precision: Precision, trust_remote_code: bool, *others: Any) -> None:
        # `others` are handles of the application's other deployments: Serve deploys what its root's arguments reach.
        torch.set_num_threads(config.reward.threads)
        model = load_reward_model(path, precision=precision, trust_remote_code=trust_remote_code)
        self._offset = reward_offset(model)
        super().__init__(model, "reward", config, config.reward)

    def forward(self, ids_BS: torch.Tensor, attention_BS: torch.Tensor) -> list[torch.Tensor]:
        return list((sequence_scores(self._model, ids_BS, attention_BS) - self._offset)[:, None])


class ReferenceReplica(SequenceReplica):
    """Log-probs of each sequence's tokens after the first, at the rollout's temperature: S - 1 per sequence of S."""

    def __init__(self, path: str, config: ScoringConfig, precision: Precision, trust_remote_code: bool, temperature: float) -> None:
        torch.set_num_threads(config.reference.threads)
        self._temperature = temperature
        super().__init__(load_causal_lm(path, precision, trust_remote_code), "reference", config, config.reference)

    def forward(self, ids_BS: torch.Tensor, attention_BS: torch.Tensor) -> list[torch.Tensor]:
        logprobs_BR = sequence_logprobs(self._model, ids_BS, attention_BS, temperature=self._temperature)
        lengths = attention_BS.sum(-1).tolist()
        return [row[: length - 1] for row, length in zip(logprobs_BR.cpu(), lengths, strict=True)]
