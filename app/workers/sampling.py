"""One batch of prompts in the rollout engines: dealt over them, handed out as responses end, dealt again where an engine dies."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from app.errors import EngineDiedError, RolloutError
from app.experience import FinishReason, Prompt, Rollout
from app.workers.pending import collect
from app.workers.rollout_engine import Sampled
from app.workers.watchdog import late, patiently

if TYPE_CHECKING:
    from app.workers.rollout_pool import VllmRolloutPool


def request_seed(seed: int, prompt_id: str, sample: int) -> int:
    """Sampling seed of one response: depends on what is sampled, never on which engine samples it or beside what."""
    digest = hashlib.blake2b(f"{seed}:{prompt_id}:{sample}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


@dataclass(frozen=True)
class _Share:
    """What one engine was given: the places of its prompts in the batch, in its own order."""

    k: int
    engine: Any
    places: list[int]


class Sampling:
    """`app.interfaces.Sampling`: one batch in the engines."""

    def __init__(self, pool: VllmRolloutPool, prompts: Sequence[Prompt], *, seed: int, deadline_seconds: float) -> None:
        self._pool, self._prompts, self._deadline_seconds = pool, prompts, deadline_seconds
        self._waiting: dict[str, Any] = {
            "phase": "rollout",
            "deadline_seconds": deadline_seconds,
            "failure": RolloutError,
            "died": EngineDiedError,
        }
        self._samples = _sample_numbers(prompts)
        self._seeds = [request_seed(seed, prompt.id, sample) for prompt, sample in zip(prompts, self._samples, strict=True)]
        self._rollouts: dict[int, Rollout] = {}
        self._streams: dict[Any, _Share] = {}
        self._cancelled = False
        engines = list(pool.engines)
        count = len(engines)
        for k, engine in enumerate(engines):
            if places := list(range(k, len(prompts), count)):
                self._deal(_Share(k, engine, places))

    def finished(self) -> Iterator[list[int]]:
        """Places of responses that have just ended, group after group until all have. Raises RolloutError, DeadlineError."""
        while self._streams:
            try:
                patiently(self._wait_for_one, phase="rollout", seconds=self._deadline_seconds)
            except TimeoutError:
                raise late(
                    "rollout",
                    f"none of {len(self._prompts) - len(self._rollouts)} responses ended within {self._deadline_seconds:g} s "
                    "(raise run.deadline_seconds if the work is simply that long)",
                ) from None
            ready, _ = ray.wait(list(self._streams), num_returns=len(self._streams), timeout=0)
            places = [place for stream in ready for place in self._take(stream)]
            if places:
                yield places

    def __getitem__(self, place: int) -> Rollout:
        """A response that has ended."""
        return self._rollouts[place]

    def result(self) -> list[Rollout]:
        """Wait for all, in the order of the prompts."""
        for _ in self.finished():
            pass
        return [self._rollouts[place] for place in range(len(self._prompts))]

    def cancel(self) -> None:
        """See `app.interfaces.Sampling`. Engines drop everything that they have in flight, of other samplings too."""
        self._cancelled = True
        for share in list(self._streams.values()):
            share.engine.discard.remote()

    def _wait_for_one(self, seconds: float) -> None:
        ready, _ = ray.wait(list(self._streams), num_returns=1, timeout=seconds)
        if not ready:
            raise TimeoutError

    def _deal(self, share: _Share) -> None:
        prompts, seeds = [self._prompts[i].ids for i in share.places], [self._seeds[i] for i in share.places]
        self._streams[share.engine.generate.options(num_returns="streaming").remote(prompts, seeds)] = share
        if self._cancelled:  # meanwhile, by another thread
            self.cancel()

    def _take(self, stream: Any) -> list[int]:
        """Places of the next responses of one engine; its unfinished prompts go to another one where it has died."""
        share = self._streams[stream]
        try:
            reference = next(stream)
        except StopIteration:
            del self._streams[stream]
            return []
        try:
            (answers,) = collect([reference], **self._waiting)
        except EngineDiedError:
            del self._streams[stream]
            if self._cancelled:
                raise
            missing = [place for place in share.places if place not in self._rollouts]
            if missing and self._pool.exact:
                missing = share.places
                for place in missing:
                    self._rollouts.pop(place, None)
            if missing:
                self._deal(_Share(share.k, self._pool.replace(share.k, share.engine), missing))
            return []
        places = [share.places[index] for index, _ in answers]
        for place, (_, sampled) in zip(places, answers, strict=True):
            self._rollouts[place] = _rollout(self._prompts[place], self._samples[place], sampled)
        return places


def _sample_numbers(prompts: Sequence[Prompt]) -> list[int]:
    """0 for the first occurrence of a prompt in the batch, 1 for the second, ..."""
    seen: Counter[str] = Counter()
    numbers = []
    for prompt in prompts:
        numbers.append(seen[prompt.id])
        seen[prompt.id] += 1
    return numbers


def _rollout(prompt: Prompt, sample: int, sampled: Sampled) -> Rollout:
    if not len(sampled.ids) or not np.isfinite(sampled.logprobs).all():
        raise RolloutError(
            f"prompt {prompt.id}: the engine returned {len(sampled.ids)} tokens with log-probs {sampled.logprobs[:4]}...: "
            "its weights are not finite, or the prompt fills the whole context"
        )
    return Rollout(prompt, sample, sampled.ids, sampled.logprobs, FinishReason(sampled.finish), sampled.versions)
