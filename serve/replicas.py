"""A replica of one model of the scoring service: token ids in, scores, log-probs or logits out.

Requests of all callers share forward passes; one that cannot be computed is refused before it joins a batch. Weights are replaced
between two batches, so that every answer is wholly of one version.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from app.config.serving import OUTPUTS, Output, ServedModelConfig
from app.errors import BadRequestError, ModelError, ScoringError, TooLongError, first_line
from app.experience import IntArray
from app.models.heads import Precision
from app.models.scoring import Answer, ScoringModel, kind_of
from app.workers.scoring_messages import ModelDescription, ModelIdentity, ScoringAnswer, ScoringRequest
from app.workers.stacks import write_stacks_on_signal
from serve.answer_cache import AnswerCache
from serve.batching import Batch, Batcher
from serve.replica_metrics import ReplicaMetrics

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class _Work:
    """What one request brings into a batch."""

    sequences: list[IntArray]
    output: Output


@dataclass(frozen=True)
class _Loaded:
    model: ScoringModel
    identity: ModelIdentity


@dataclass(frozen=True)
class _Computed:
    answers: list[Answer]
    identity: ModelIdentity


class ModelReplica:
    """One process that holds one model. Raises ModelError for a folder that is none."""

    def __init__(
        self, name: str, config: ServedModelConfig, precision: Precision = "fp32", trust_remote_code: bool = False, *others: Any
    ) -> None:
        # `others` are handles of the application's other deployments: Serve deploys what its root's arguments reach.
        write_stacks_on_signal(f"scoring replica of {name}")
        torch.set_num_threads(config.workers.threads)
        self._name, self._config = name, config
        self._precision, self._trust_remote_code = precision, trust_remote_code
        self._loaded = self._load(config.path, config.version)
        self._broken: Exception | None = None
        self._refused = ""
        self._counters: Counter[str] = Counter()
        self._metrics = ReplicaMetrics(name)
        self._cache = AnswerCache(config.batching.cache_entries)
        self._batcher: Batcher[_Work, _Computed] = Batcher(
            self._compute,
            max_tokens=config.batching.max_batch_tokens,
            wait_seconds=config.batching.wait_seconds,
            max_waiting=config.batching.max_waiting_tokens,
            padded=lambda: not self._loaded.model.packs,
        )

    async def infer(self, request: ScoringRequest) -> ScoringAnswer:
        """The answer to all sequences of a request.

        Raises BadRequestError, TooLongError, OverloadedError, ScoringTimeoutError, and ScoringError for an answer that is not finite.
        """
        began = time.perf_counter()
        outcome = "failed"
        try:
            check_request(request, self._loaded.model, self._name)
            answer = await self._answer(request)
            outcome = "ok"
            return answer
        except ScoringError as error:
            outcome = type(error).__name__.removesuffix("Error")
            raise
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        finally:
            self._metrics.request(outcome, time.perf_counter() - began)

    async def describe(self) -> ModelDescription:
        """What is loaded now."""
        model = self._loaded.model
        return ModelDescription(
            self._loaded.identity, model.kind, model.vocabulary, model.context, model.path, self._config.timeout_seconds, self._refused
        )

    async def stats(self) -> dict[str, int]:
        """Counters since the start of this replica: requests, sequences, tokens, padding, batches, passes, largest_batch (requests)."""
        return {**self._counters, "pid": os.getpid()}

    async def check_health(self) -> None:
        """Serve replaces a replica that fails this, or does not answer it in time. Raises what broke the device: nothing more is computed
        on one that has failed."""
        if self._broken is not None:
            raise self._broken

    async def reconfigure(self, settings: Mapping[str, str]) -> None:
        """Take other weights: load them beside the old ones, then switch between two batches.

        What cannot be loaded leaves the old ones in place, and `describe` tells why: if this raised, Serve would stop the replica.
        """
        path, version = settings["path"], settings["version"]
        self._refused = ""
        if (path, version) != (self._loaded.model.path, self._loaded.identity.version):
            try:
                self._loaded = await asyncio.get_running_loop().run_in_executor(None, self._load, path, version)
            except (ModelError, RuntimeError) as error:  # RuntimeError: no memory for both, or weights of other shapes
                self._refused = f"version {version} of {path} is not served: {first_line(error)}"
                logger.error(self._refused)

    def _load(self, path: str, version: str) -> _Loaded:
        config = self._config
        model = ScoringModel(
            path,
            config.kind or kind_of(path),
            precision=self._precision,
            trust_remote_code=self._trust_remote_code,
            temperature=config.temperature,
            device="cuda" if config.workers.gpus > 0 else "cpu",
        )
        return _Loaded(model, ModelIdentity(self._name, version, model.weights_hash))

    async def _answer(self, request: ScoringRequest) -> ScoringAnswer:
        """Out of the cache what is there, the rest out of a batch; both of the same weights."""
        sequences = np.split(request.ids, np.cumsum(request.lengths)[:-1])
        while True:
            identity = self._loaded.identity
            known: list[Answer | None] = [None] * len(sequences)
            if not request.alone:
                known = [self._cache.get(identity.weights_hash, request.output, ids) for ids in sequences]
            missing = [ids for ids, answer in zip(sequences, known, strict=True) if answer is None]
            self._metrics.cached(len(sequences) - len(missing))
            if missing:
                work, lengths, timeout = _Work(missing, request.output), [len(ids) for ids in missing], self._config.timeout_seconds
                computed = await self._batcher.submit(work, lengths, timeout_seconds=timeout, alone=request.alone, client=request.client)
                for ids, answer in zip(missing, computed.answers, strict=True):
                    self._cache.put(computed.identity.weights_hash, request.output, ids, answer)
                if computed.identity != identity and len(missing) < len(sequences):
                    continue  # the weights were replaced between looking up and computing
                identity, fresh = computed.identity, iter(computed.answers)
                known = [next(fresh) if answer is None else answer for answer in known]
            return ScoringAnswer(np.concatenate([answer for answer in known if answer is not None]), identity)

    def _compute(self, batch: Batch[_Work]) -> list[_Computed | ScoringError]:
        """In the batcher's thread: the batch, in one pass where it fits; what one request has wrong fails no other."""
        loaded, began = self._loaded, time.perf_counter()
        padding: list[int] = []
        answers: dict[int, _Computed | ScoringError] = {}
        for output in {work.output for work in batch.items}:
            places = [place for place, work in enumerate(batch.items) if work.output == output]
            works = [batch.items[place] for place in places]
            answers.update(zip(places, self._answers_of(works, output, loaded, padding.append), strict=True))
        self._count(batch, padding, time.perf_counter() - began)
        return [answers[place] for place in range(len(batch.items))]

    def _answers_of(
        self, works: list[_Work], output: Output, loaded: _Loaded, on_padding: Callable[[int], None]
    ) -> list[_Computed | ScoringError]:
        sequences = [ids for work in works for ids in work.sequences]
        try:
            check_sequences(sequences, output, loaded.model, self._name)  # other weights may have come since `infer` looked
            found = iter(loaded.model.answers(sequences, self._config.batching.max_batch_tokens, output=output, on_padding=on_padding))
        except torch.AcceleratorError as error:
            self._broken = error
            raise
        except ScoringError as error:
            if len(works) == 1:
                return [error]
            return [answer for work in works for answer in self._answers_of([work], output, loaded, on_padding)]
        return [_Computed([next(found) for _ in work.sequences], loaded.identity) for work in works]

    def _count(self, batch: Batch[_Work], padding: list[int], seconds: float) -> None:
        sequences = [ids for work in batch.items for ids in work.sequences]
        tokens = sum(map(len, sequences))
        self._counters.update(batches=1, passes=len(padding), requests=len(batch.items), sequences=len(sequences))
        self._counters.update(tokens=tokens, padding=sum(padding))
        self._counters["largest_batch"] = max(self._counters["largest_batch"], len(batch.items))
        self._metrics.batch(len(sequences), tokens, sum(padding), seconds, batch.waited)


def check_request(request: ScoringRequest, model: ScoringModel, name: str) -> None:
    """Raises BadRequestError or TooLongError for what the model cannot answer."""
    ids, lengths = request.ids, request.lengths
    if not len(lengths) or int(lengths.sum()) != len(ids):
        raise BadRequestError(f"lengths of {len(lengths)} sequences sum to {int(lengths.sum())}, but there are {len(ids)} ids")
    if lengths.min() < 1:
        raise BadRequestError("a sequence is empty: every sequence needs at least one token")
    check_sequences([ids], request.output, model, name, longest=int(lengths.max()))


def check_sequences(sequences: list[IntArray], output: Output, model: ScoringModel, name: str, longest: int | None = None) -> None:
    """Raises BadRequestError or TooLongError for sequences or an output that the model does not have."""
    if output not in OUTPUTS[model.kind]:
        raise BadRequestError(f"{name} is a {model.kind} model: it gives {' and '.join(OUTPUTS[model.kind])}, not {output}")
    longest = max(map(len, sequences)) if longest is None else longest
    if model.context is not None and longest > model.context:
        raise TooLongError(f"a sequence has {longest} tokens, the {name} model's context is {model.context}: shorten it")
    low, high = min(int(ids.min()) for ids in sequences), max(int(ids.max()) for ids in sequences)
    if low < 0 or high >= model.vocabulary:
        raise BadRequestError(
            f"token ids range from {low} to {high}, the {name} model's vocabulary is 0..{model.vocabulary - 1}: "
            "policy, reward model and reference must share one tokenizer"
        )
