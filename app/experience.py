"""What flows through the PPO loop. Frozen; shapes are documented here and nowhere else.

Shape legend: B rollouts, P tokens of one prompt, T response tokens (the longest of the batch where batched),
S = longest prompt + response. Batched sequences are right-padded: row b holds its prompt, then its response, then padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
import torch

IntArray = np.ndarray[Any, np.dtype[np.int32]]
FloatArray = np.ndarray[Any, np.dtype[np.float32]]
DoubleArray = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Prompt:
    """A conversation that ends in an open assistant turn.

    id: stable across runs; text: the last user turn, for people; ids: int32 [P], what the engine continues;
    messages: the conversation as {"role", "content"} mappings; reference: int32 [T], a good answer with its end token, where the
    data has one and the run compares with it.
    """

    id: str
    text: str
    ids: IntArray
    messages: tuple[Mapping[str, str], ...] = ()
    reference: IntArray | None = None


class FinishReason(StrEnum):
    STOP = "stop"  # the model sampled its end token
    LENGTH = "length"  # the token limit came first


@dataclass(frozen=True)
class Rollout:
    """One sampled response.

    ids: int32 [T] including the end token where one was sampled; logprobs: float32 [T], log p under the engine that
    sampled them (the behaviour policy); versions: int32 [T], how many updates the weights had seen that sampled each token.
    """

    prompt: Prompt
    sample: int
    ids: IntArray
    logprobs: FloatArray
    finish: FinishReason
    versions: IntArray

    @property
    def policy_version(self) -> int:
        """Of the oldest weights that took part."""
        return int(self.versions.min())

    @property
    def sequence(self) -> IntArray:
        """Prompt and response, int32 [P + T]."""
        return np.concatenate([self.prompt.ids, self.ids])

    def of_response(self, per_token: FloatArray) -> FloatArray:
        """Out of one number per predicted token of `sequence`, [P + T - 1], those of the response, [T]."""
        return per_token[len(self.prompt.ids) - 1 :]


@dataclass(frozen=True)
class Scores:
    """What a reward says about a batch of rollouts; every array is float64 [B], NaN where the score failed.

    total_B: what is trained on; parts: each named part by itself; held_out: the parts that total_B leaves out;
    disagreement_B: standard deviation over an ensemble's models (of several ensembles the largest), None without one;
    failures: part -> the first reason why a score of it failed.
    """

    total_B: DoubleArray
    parts: Mapping[str, DoubleArray] = field(default_factory=dict)
    held_out: frozenset[str] = frozenset()
    disagreement_B: DoubleArray | None = None
    failures: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenBatch:
    """Rollouts as right-padded tensors.

    ids_BS int64; attention_BS bool, True on prompt and response; prompt_lengths_B, response_lengths_B int64;
    mask_BT bool, True on response tokens.
    """

    ids_BS: torch.Tensor
    attention_BS: torch.Tensor
    prompt_lengths_B: torch.Tensor
    response_lengths_B: torch.Tensor
    mask_BT: torch.Tensor

    @classmethod
    def from_rollouts(cls, rollouts: Sequence[Rollout], pad_id: int) -> TokenBatch:
        sequences = [torch.from_numpy(r.sequence.astype(np.int64)) for r in rollouts]
        prompt_lengths = torch.tensor([len(r.prompt.ids) for r in rollouts])
        response_lengths = torch.tensor([len(r.ids) for r in rollouts])
        ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=pad_id)
        lengths = prompt_lengths + response_lengths
        return cls(
            ids_BS=ids,
            attention_BS=torch.arange(ids.shape[1]) < lengths[:, None],
            prompt_lengths_B=prompt_lengths,
            response_lengths_B=response_lengths,
            mask_BT=torch.arange(int(response_lengths.max())) < response_lengths[:, None],
        )

    def rows(self, index: torch.Tensor) -> TokenBatch:
        """The rows `index` (int64 [b]), cut to the longest sequence and response among them."""
        prompt, response = self.prompt_lengths_B[index], self.response_lengths_B[index]
        longest = int((prompt + response).max())
        return TokenBatch(
            ids_BS=self.ids_BS[index, :longest],
            attention_BS=self.attention_BS[index, :longest],
            prompt_lengths_B=prompt,
            response_lengths_B=response,
            mask_BT=self.mask_BT[index, : int(response.max())],
        )

    def __len__(self) -> int:
        return len(self.ids_BS)


def prompt_groups(rollouts: Sequence[Rollout]) -> torch.Tensor:
    """int64 [B]: rollouts of the same prompt have the same number, in order of appearance."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(rollout.prompt.id for rollout in rollouts))}
    return torch.tensor([numbers[rollout.prompt.id] for rollout in rollouts])


def pad_rows(rows: Sequence[FloatArray], length: int) -> torch.Tensor:
    """Stack float arrays [t_b] as float32 [len(rows), length], zeros behind each row's end."""
    out = torch.zeros(len(rows), length)
    for target, row in zip(out, rows, strict=True):
        target[: len(row)] = torch.as_tensor(np.array(row, dtype=np.float32))  # a copy: rows out of the object store are read-only
    return out


@dataclass(frozen=True)
class Experience:
    """One batch of rollouts with everything the update needs. Every [B, T] tensor is float32 and 0 where mask_BT is False.

    Three log-probs per response token: `behaviour` (the engine's, at sampling), `proximal` (the learner's, before the
    update) and, computed during the update, current. `reference` belongs to the frozen SFT policy. `values` are the
    critic's, at the state before each token; None without a critic. `scores_B` are reward-model scores after shaping, NaN
    where scoring failed (those rows are masked out). groups_B: int64, the same number on all rollouts of one prompt; None
    where each has a prompt of its own. The last four fields are filled by an algorithm's `credit`; kl_coef is the weight of
    the KL penalty that it was given.
    """

    tokens: TokenBatch
    scores_B: torch.Tensor
    behaviour_BT: torch.Tensor
    proximal_BT: torch.Tensor
    reference_BT: torch.Tensor
    values_BT: torch.Tensor | None
    groups_B: torch.Tensor | None = None
    rewards_BT: torch.Tensor | None = None
    advantages_BT: torch.Tensor | None = None
    returns_BT: torch.Tensor | None = None
    kl_coef: float = 0.0

    @property
    def mask_BT(self) -> torch.Tensor:
        return self.tokens.mask_BT


@dataclass(frozen=True)
class Minibatch:
    """The rows of an `Experience` that one micro-batch trains on; [b, t] tensors, cut to the longest response.
    old_values_BT is None without a critic."""

    tokens: TokenBatch
    behaviour_BT: torch.Tensor
    proximal_BT: torch.Tensor
    reference_BT: torch.Tensor
    old_values_BT: torch.Tensor | None
    advantages_BT: torch.Tensor
    returns_BT: torch.Tensor
    kl_coef: float = 0.0

    @classmethod
    def from_rows(cls, experience: Experience, index: torch.Tensor) -> Minibatch:
        if experience.advantages_BT is None or experience.returns_BT is None:
            raise ValueError("experience has no advantages: call the algorithm's credit() first")
        tokens = experience.tokens.rows(index)
        length = tokens.mask_BT.shape[1]

        def cut(x: torch.Tensor) -> torch.Tensor:
            return x[index, :length]

        return cls(
            tokens=tokens,
            behaviour_BT=cut(experience.behaviour_BT),
            proximal_BT=cut(experience.proximal_BT),
            reference_BT=cut(experience.reference_BT),
            old_values_BT=None if experience.values_BT is None else cut(experience.values_BT),
            advantages_BT=cut(experience.advantages_BT),
            returns_BT=cut(experience.returns_BT),
            kl_coef=experience.kl_coef,
        )

    @property
    def mask_BT(self) -> torch.Tensor:
        return self.tokens.mask_BT


@dataclass(frozen=True)
class Totals:
    """Global denominators of one optimizer step, over every rank and micro-batch: response tokens and sequences."""

    tokens: int
    sequences: int


@dataclass(frozen=True)
class PolicyOutputs:
    """What policy and critic compute for a minibatch: current log-probs, values (None without a critic) and entropy, each [b, t]."""

    logprobs_BT: torch.Tensor
    values_BT: torch.Tensor | None
    entropy_BT: torch.Tensor


@dataclass(frozen=True)
class Loss:
    """Losses to descend, each a scalar already divided by the global totals, and metric *sums* to be added over
    micro-batches and ranks (they too are divided by the totals, so that their sum is the mean)."""

    policy: torch.Tensor
    value: torch.Tensor | None
    metrics: Mapping[str, float] = field(default_factory=dict)
