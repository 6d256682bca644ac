"""The Protocols that the loop is written against. Unit tests drive the loop with in-process fakes of these."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, TypeVar

import torch

from app.experience import Experience, FloatArray, IntArray, Prompt, Rollout, Scores, TokenBatch

T_co = TypeVar("T_co", covariant=True)


class Pending(Protocol[T_co]):
    """Work in flight."""

    def result(self) -> T_co:
        """Wait for it. Raises DeadlineError, or what the work raised."""
        ...


class Sampling(Pending[list[Rollout]], Protocol):
    """Responses in the making, one per prompt. Raises RolloutError when an engine fails for good, DeadlineError when none ends in time.

    `result()` waits for all and gives them in the order of the prompts. One thread follows a sampling; any other may cancel it."""

    def finished(self) -> Iterator[Sequence[int]]:
        """Places of responses that have just ended, group after group, until all have."""
        ...

    def __getitem__(self, place: int) -> Rollout:
        """A response that has ended."""
        ...

    def cancel(self) -> None:
        """Nobody wants what has not ended yet. Whoever waits for it is told by a RolloutError."""
        ...


class RolloutPool(Protocol):
    """Rollout engines that hold one policy."""

    def submit(self, prompts: Sequence[Prompt], *, seed: int) -> Sampling:
        """Start sampling one response per prompt; the same seed, prompts and weights sample the same responses. A prompt that is given
        several times is sampled as often, each time differently."""
        ...

    def logprobs(self, sequences: Sequence[IntArray]) -> list[FloatArray]:
        """Per sequence [S]: float32 [S-1], entry t = log p(ids[t+1] | ids[..t]) under the engines' current weights."""
        ...


class Learner(Protocol):
    """The policy and, where the algorithm has one, the critic under training."""

    def inspect(self, tokens: TokenBatch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-probs of the response tokens and values before them (None without a critic), both float32 [B, T], without gradient."""
        ...

    def update(self, experience: Experience, *, step: int) -> Mapping[str, float]:
        """Epochs x minibatches of optimizer steps over a credited experience; returns metrics. step: of the loop, from 0; the order of
        rows, and what there is to learn beside the experience, depend on it and the run's seed alone.

        Raises NonFiniteError, and LearnerError when the first step does not start from the proximal log-probs."""
        ...

    def save(self, folder: str) -> None:
        """Write everything an exact resume needs (models, optimizers, schedules, RNG) under `folder`."""
        ...

    def load(self, folder: str) -> None:
        """Restore what `save` wrote. Raises CheckpointError if a part is missing."""
        ...

    def export(self, folder: str) -> None:
        """Write the policy as a Hugging Face folder (safetensors, config, tokenizer, chat template)."""
        ...


class Publisher(Protocol):
    """Carries the learner's policy weights into the rollout engines."""

    def publish(self, version: int) -> Mapping[str, float]:
        """Push the current weights to every engine, label them `version`, and compare both sides on canary sequences.

        Returns metrics (seconds, bytes, canary mismatch). Raises WeightPushError when the two sides disagree."""
        ...


class Scorer(Protocol):
    """The scoring service: reward model and frozen reference policy. Token ids in, floats out."""

    def scores(self, sequences: Sequence[IntArray]) -> Pending[list[float]]:
        """Reward-model score (logit - reward_offset) of each sequence [S]. A failed score is a ScoringError."""
        ...

    def logprobs(self, sequences: Sequence[IntArray]) -> Pending[list[FloatArray]]:
        """Per sequence [S]: float32 [S-1], entry t = log p(ids[t+1] | ids[..t]) under the reference policy."""
        ...


class Reward(Protocol):
    """Scores rollouts (before shaping)."""

    def score(self, rollouts: Sequence[Rollout]) -> Pending[Scores]: ...


class Tracker(Protocol):
    """Where metrics go."""

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Record scalar metrics of one step of a stage (`sft`, `rm`, `ppo`, `evaluation`)."""
        ...

    def event(self, stage: str, step: int, text: str) -> None:
        """Record in words what happened at a step."""
        ...
