"""Which row is trained on when: a function of seed and step alone, the same on every worker and after every restart."""

from __future__ import annotations

import math
from collections.abc import Sequence

from app.data.mixture import Mixture


def total_steps(rows_per_epoch: int, *, epochs: float, batch_size: int, max_steps: int | None) -> int:
    """Optimizer steps that take at least `epochs` epochs, cut at `max_steps`."""
    steps = max(1, math.ceil(epochs * rows_per_epoch / batch_size))
    return steps if max_steps is None else min(steps, max_steps)


def step_rows(step: int, *, mixture: Mixture, batch_size: int, seed: int) -> list[int]:
    """The `batch_size` row indices of optimizer step `step` (from 0). Batches run on across epochs, so every batch is full."""
    return mixture.rows(step * batch_size, batch_size, seed=seed)


def micro_batches(indices: Sequence[int], lengths: Sequence[int], *, micro_batch_size: int, rank: int, world_size: int) -> list[list[int]]:
    """This worker's share of one step: equally many micro-batches on every worker.

    `lengths[i]` is the length of row i. Rows of similar length share a micro-batch and workers get similar lengths at the
    same time, which saves padding and waiting; the step's loss does not depend on it. `indices` must divide evenly.
    """
    if len(indices) % (micro_batch_size * world_size):
        raise ValueError(f"{len(indices)} rows do not divide into micro-batches of {micro_batch_size} on {world_size} workers")
    order = sorted(indices, key=lambda i: (lengths[i], i))
    chunks = [order[start : start + micro_batch_size] for start in range(0, len(order), micro_batch_size)]
    return chunks[rank::world_size]


def evaluation_batches(lengths: Sequence[int], *, micro_batch_size: int, rank: int, world_size: int) -> list[list[int]]:
    """This worker's share of all rows, each row on exactly one worker. Every worker gets equally many lists; some may be empty."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    chunks = [order[start : start + micro_batch_size] for start in range(0, len(order), micro_batch_size)]
    chunks += [[] for _ in range(-len(chunks) % world_size)]
    return chunks[rank::world_size]
