"""The pretraining mix of PPO-ptx: the policy's next-token loss on other text, whose gradient joins that of the policy loss.

Shape legend: B sequences, S tokens, R = S - 1 predicted tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from app.config.ppo import PpoConfig
from app.data.batch_order import PassLimit, RowShape, micro_batches, step_rows
from app.data.mixture import Mixture
from app.data.token_cache import SftRow, read_threads
from app.errors import NonFiniteError
from app.models.forward import pad_sequences


def summed_loss(policy: Callable[..., Any], rows: Sequence[SftRow], device: torch.device) -> torch.Tensor:
    """Sum of -log p of the rows' target tokens at temperature 1, a scalar with gradient. policy: called as `PolicyModel` is."""
    ids_BS, attention_BS = pad_sequences([row.ids for row in rows], device)
    targets_BR = torch.zeros(attention_BS[:, 1:].shape, dtype=torch.bool)
    for targets_R, row in zip(targets_BR, rows, strict=True):
        targets_R[: len(row.ids) - 1] = torch.from_numpy(row.loss_mask[1:])
    first_B = torch.ones(len(rows), dtype=torch.long, device=device)
    logprobs_BR, *_ = policy(ids_BS, attention_BS, first_B, attention_BS[:, 1:], 1.0)
    return -logprobs_BR.masked_fill(~targets_BR.to(device), 0.0).sum()


class PretrainingMix:
    """One rank's part. Which sequences an optimizer step takes is a function of seed and step alone, so a resumed run goes on with them;
    every rank knows all of them, so that the mean is over the target tokens of the whole step."""

    def __init__(self, file: Path, config: PpoConfig, seed: int, rank: int, world: int, device: torch.device, *, padded: bool) -> None:
        """file: token cache; padded: a forward pass gives each sequence the room of the longest. Raises DataError."""
        mix = config.pretraining
        self._rows = read_threads(file)
        self._mixture = Mixture.of(self._rows.datasets, {})
        self._coef, self._batch_size, self._seed = mix.coef, mix.batch_size, seed
        self._rank, self._world, self._device = rank, world, device
        self._limit = PassLimit(min(mix.micro_batch_size, mix.batch_size // world), config.micro_batch_tokens, padded=padded)

    def batches(self, step: int) -> tuple[list[list[SftRow]], int]:
        """This rank's micro-batches of an optimizer step (from 0, over the whole run), and the target tokens of all ranks."""
        rows = [self._rows[i] for i in step_rows(step, mixture=self._mixture, batch_size=self._batch_size, seed=self._seed)]
        shapes = [RowShape(1, len(row.ids), len(row.ids)) for row in rows]
        mine = micro_batches(range(len(rows)), shapes, self._limit, rank=self._rank, world_size=self._world)
        return [[rows[i] for i in batch] for batch in mine], sum(int(row.loss_mask.sum()) for row in rows)

    def accumulate(self, policy: Any, step: int) -> float:
        """Add coef x the gradient of the mean loss to the policy engine's, before the optimizer step's last micro-batch.

        Returns this rank's share of the mean; over the ranks they add up to it, in nats per target token. Raises NonFiniteError.
        """
        from app.workers.deepspeed_engine import backward_scaled, begin_micro_batch, optimizer_step

        batches, targets = self.batches(step)
        mean = 0.0
        for rows in batches:
            begin_micro_batch(policy, last=False)
            share = summed_loss(policy, rows, self._device) / targets
            mean += share.item()
            backward_scaled(policy, self._coef * share)
            optimizer_step(policy)  # only counts
        if not math.isfinite(mean):
            raise NonFiniteError(
                f"loss on the text of ppo.pretraining is {mean} on rank {self._rank}, before the optimizer step: lower the learning rate"
            )
        return mean
