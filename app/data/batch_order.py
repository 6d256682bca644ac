"""Which row is trained on when: a function of seed and step alone, the same on every worker and after every restart."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from app.data.mixture import Mixture


class RowShape(NamedTuple):
    """What a row brings into a forward pass: sequences, tokens of the longest, and tokens of all of them."""

    sequences: int
    longest: int
    tokens: int


@dataclass(frozen=True)
class PassLimit:
    """How much one forward pass on one worker takes.

    rows: that many rows; tokens: as many rows as make at most so many tokens instead (a row that has more goes alone).
    padded: every sequence takes as much room as the longest of its pass.
    """

    rows: int
    tokens: int | None = None
    padded: bool = True

    def cost(self, rows: Iterable[RowShape]) -> int:
        """Tokens that a pass over `rows` computes.

        >>> rows = [RowShape(1, 3, 3), RowShape(2, 4, 7)]
        >>> PassLimit(8).cost(rows), PassLimit(8, padded=False).cost(rows)
        (12, 10)
        """
        rows = list(rows)
        if self.padded:
            return sum(row.sequences for row in rows) * max(row.longest for row in rows)
        return sum(row.tokens for row in rows)


def total_steps(rows_per_epoch: int, *, epochs: float, batch_size: int, max_steps: int | None) -> int:
    """Optimizer steps that take at least `epochs` epochs, cut at `max_steps`."""
    steps = max(1, math.ceil(epochs * rows_per_epoch / batch_size))
    return steps if max_steps is None else min(steps, max_steps)


def step_rows(step: int, *, mixture: Mixture, batch_size: int, seed: int) -> list[int]:
    """The `batch_size` row indices of optimizer step `step` (from 0). Batches run on across epochs, so every batch is full."""
    return mixture.rows(step * batch_size, batch_size, seed=seed)


def micro_batches(
    indices: Sequence[int],
    shapes: Sequence[RowShape],
    limit: PassLimit,
    *,
    rank: int,
    world_size: int,
    beginnings: Sequence[Hashable] | None = None,
) -> list[list[int]]:
    """This worker's share of one step: equally many micro-batches on every worker, none empty.

    `shapes[i]` is the shape of row i. Rows of similar length share a micro-batch where it is padded; workers get like amounts
    of work at the same time. The step's loss depends on none of this. `indices` must divide evenly over the workers, and where
    `limit` counts rows over the micro-batches as well.

    beginnings[i]: what row i begins with. Rows of the same beginning are kept together, as far as all this allows: a pass without
    padding computes it once (see app.models.packed). What `limit` says counts it for each of them all the same.
    """
    unit = world_size * (limit.rows if limit.tokens is None else 1)
    if len(indices) % unit:
        raise ValueError(f"{len(indices)} rows do not divide into micro-batches of {unit // world_size} on {world_size} workers")
    bundles = _bundles(_by_length(indices, shapes), shapes, beginnings)
    if limit.tokens is None or limit.padded:
        batches = _divided(_in_order([index for bundle in bundles for index in bundle], shapes, limit), shapes, limit, world_size)
    else:
        batches = _balanced(_divided(bundles, shapes, limit, world_size), shapes, limit, world_size)
    return batches[rank::world_size]


def evaluation_batches(shapes: Sequence[RowShape], limit: PassLimit, *, rank: int, world_size: int) -> list[list[int]]:
    """This worker's share of all rows, each row on exactly one worker. Every worker gets equally many lists; some may be empty."""
    batches = _in_order(_by_length(range(len(shapes)), shapes), shapes, limit)
    batches += [[] for _ in range(-len(batches) % world_size)]
    return batches[rank::world_size]


def _by_length(indices: Iterable[int], shapes: Sequence[RowShape]) -> list[int]:
    return sorted(indices, key=lambda i: (shapes[i].longest, i))


def _in_order(order: Sequence[int], shapes: Sequence[RowShape], limit: PassLimit) -> list[list[int]]:
    """Pass after pass filled to the limit, so that rows of similar length meet."""
    batches: list[list[int]] = []
    for index in order:
        last = batches[-1] if batches else []
        if last and _fits([shapes[i] for i in [*last, index]], limit):
            last.append(index)
        else:
            batches.append([index])
    return batches


def _fits(rows: Sequence[RowShape], limit: PassLimit) -> bool:
    return len(rows) <= limit.rows if limit.tokens is None else limit.cost(rows) <= limit.tokens


def _bundles(order: Sequence[int], shapes: Sequence[RowShape], beginnings: Sequence[Hashable] | None) -> list[list[int]]:
    """Rows of the same beginning, by the length of the longest of them, those of `order` otherwise as they stand there; one row each
    without beginnings."""
    if beginnings is None:
        return [[index] for index in order]
    bundles: dict[Hashable, list[int]] = {}
    for index in order:
        bundles.setdefault(beginnings[index], []).append(index)
    return sorted(bundles.values(), key=lambda bundle: max(shapes[i].longest for i in bundle))


def _divided(bundles: Sequence[list[int]], shapes: Sequence[RowShape], limit: PassLimit, world_size: int) -> list[list[int]]:
    """The bundles, the costliest in halves until each keeps within the limit, or is one row, and they divide evenly over the workers:
    the number of rows does."""
    divided = list(bundles)
    while True:
        several = [bundle for bundle in divided if len(bundle) > 1]
        costliest = max(several, key=lambda bundle: limit.cost(shapes[i] for i in bundle), default=None)
        if costliest is None or (_fits([shapes[i] for i in costliest], limit) and not len(divided) % world_size):
            return divided
        at = divided.index(costliest)
        divided[at : at + 1] = [costliest[: len(costliest) // 2], costliest[len(costliest) // 2 :]]


def _balanced(bundles: Sequence[list[int]], shapes: Sequence[RowShape], limit: PassLimit, world_size: int) -> list[list[int]]:
    """As few passes as the limit allows, a multiple of `world_size`, with like numbers of tokens: longest bundles first, each into the
    emptiest pass so far. The costliest come first."""
    assert limit.tokens is not None
    costs = [limit.cost(shapes[i] for i in bundle) for bundle in bundles]
    count = world_size * min(-(-sum(costs) // (limit.tokens * world_size)), len(bundles) // world_size)
    while True:
        batches: list[list[int]] = [[] for _ in range(count)]
        filled = [0] * count
        for bundle, cost in zip(reversed(bundles), reversed(costs), strict=True):
            emptiest = filled.index(min(filled))
            batches[emptiest] += bundle
            filled[emptiest] += cost
        if count == len(bundles) or all(cost <= limit.tokens or len(batch) == 1 for cost, batch in zip(filled, batches, strict=True)):
            return sorted(batches, key=lambda batch: -limit.cost(shapes[i] for i in batch))
        count += world_size
