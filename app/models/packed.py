"""Sequences behind each other in one row: no padding is computed, and what several of them begin with is computed once.

For models with attention by segment (app.models.segments).
Shape legend: N tokens of the row, M of all sequences, shared ones counted for each; B sequences, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from app.experience import IntArray
from app.models.segments import Segment

Places = np.ndarray[Any, np.dtype[np.int64]]

LEAST_SHARED, LEAST_SHARE = 16, 1 / 8
"""Fewer common tokens, such as those of a role, or less of a sequence are not worth the mask that attention to them takes: without one
it does half the work."""


@dataclass(frozen=True)
class PackedRow:
    """Sequences in one row. ids_1N and positions_1N are int64; positions count from the beginning of each sequence.

    lengths: of the sequences, in the order they were given in; where_M: the place in the row of each of their tokens, one sequence
    behind the other, int64; None where that is the row itself, because nothing is shared."""

    ids_1N: torch.Tensor
    positions_1N: torch.Tensor
    segments: list[Segment]
    lengths: list[int]
    where_M: torch.Tensor | None

    @property
    def ends_B(self) -> torch.Tensor:
        """Which of the M tokens are the last of a sequence, int64."""
        return torch.tensor(self.lengths, device=self.ids_1N.device).cumsum(0) - 1

    @property
    def inputs(self) -> dict[str, Any]:
        """What the model or its trunk is called with."""
        return {"input_ids": self.ids_1N, "position_ids": self.positions_1N, "segments": self.segments, "use_cache": False}

    def of_tokens(self, row_N: torch.Tensor) -> torch.Tensor:
        """[N, ...] -> [M, ...]: from what belongs to the row to what belongs to each token of each sequence. Carries gradients."""
        return row_N if self.where_M is None else row_N.index_select(0, self.where_M)  # whose backward adds in one order


def pack_sequences(sequences: Sequence[IntArray], device: torch.device | str = "cpu") -> PackedRow:
    """Int arrays [s_b], none of them empty."""
    sequences = [np.ascontiguousarray(ids, dtype=np.int64) for ids in sequences]
    placed = _placed(sequences)
    own = [sequences[index][shared:] for index, shared in placed]
    ids_N, positions_N = np.concatenate(own), np.concatenate([np.arange(shared, len(sequences[index])) for index, shared in placed])
    where_M = None
    if len(ids_N) < sum(map(len, sequences)):
        where_M = torch.from_numpy(np.concatenate(_places(placed, sequences))).to(device)
    segments = [Segment(len(ids), shared) for ids, (_, shared) in zip(own, placed, strict=True)]
    ids_1N, positions_1N = (torch.from_numpy(row_N)[None].to(device) for row_N in (ids_N, positions_N))
    return PackedRow(ids_1N, positions_1N, segments, [len(ids) for ids in sequences], where_M)


def _placed(sequences: Sequence[IntArray]) -> list[tuple[int, int]]:
    """Index of each sequence in the order of the row, and with how many tokens of the one before it it begins: as given where nothing is
    shared.

    >>> prompt = list(range(20))
    >>> _placed([np.array(ids) for ids in ([7, 8], [*prompt, 3], [9], [*prompt, 4, 5])])
    [(1, 0), (3, 20), (0, 0), (2, 0)]
    """
    order = alike(sequences)
    shared = [0, *(_worth_sharing(sequences[before], sequences[index]) for before, index in pairwise(order))]
    return list(zip(order, shared, strict=True)) if any(shared) else [(index, 0) for index in range(len(sequences))]


def alike(sequences: Sequence[IntArray]) -> list[int]:
    """Indices in an order in which sequences that begin alike stand together, the more alike the closer.

    >>> alike([np.array(ids) for ids in ([5, 1, 2], [4, 9], [5, 1], [5, 3])])
    [1, 2, 0, 3]
    """
    return sorted(range(len(sequences)), key=lambda index: sequences[index].tobytes())


def _worth_sharing(before: IntArray, other: IntArray) -> int:
    """How many tokens of `other` are the first ones of the sequence before it, its last not among them; 0 where they are too few.

    >>> prompt = list(range(20))
    >>> [_worth_sharing(np.array([*prompt, 7]), np.array(other)) for other in ([*prompt, 8, 9], [*prompt, 7], prompt[:16], prompt[:17])]
    [20, 20, 0, 16]
    >>> [_worth_sharing(np.array(prompt), np.array([*prompt, *range(own)])) for own in (140, 141)]
    [20, 0]
    """
    limit = min(len(before), len(other) - 1)
    differs = np.flatnonzero(before[:limit] != other[:limit])
    common = int(differs[0]) if len(differs) else limit
    return common if common >= max(LEAST_SHARED, LEAST_SHARE * len(other)) else 0


def _places(placed: Sequence[tuple[int, int]], sequences: Sequence[IntArray]) -> list[Places]:
    """Where the tokens of each sequence stand in the row, in the order of `sequences`."""
    places: dict[int, Places] = {}
    start, before = 0, np.empty(0, np.int64)
    for index, shared in placed:
        end = start + len(sequences[index]) - shared
        before = np.concatenate([before[:shared], np.arange(start, end)])
        places[index], start = before, end
    return [places[index] for index in range(len(sequences))]


def packed_batches(sequences: Sequence[IntArray], max_tokens: int) -> list[list[int]]:
    """Group sequences, those that begin alike together, so that no group has more than max_tokens tokens, shared ones counted for each; a
    longer sequence is a group of its own.

    >>> packed_batches([np.array(ids) for ids in ([5, 1, 2], [4, 9], [5, 1, 3, 3], [9, 9, 9, 9, 9, 9, 9], [7])], max_tokens=6)
    [[1, 0], [2, 4], [3]]
    """
    batches: list[list[int]] = []
    room = 0
    for index in alike(sequences):
        if not batches or len(sequences[index]) > room:
            batches.append([])
            room = max_tokens
        batches[-1].append(index)
        room -= len(sequences[index])
    return batches


def packed_hidden_states(trunk: nn.Module, row: PackedRow) -> torch.Tensor:
    """Final hidden states [N, H] of a decoder without its head."""
    return trunk(**row.inputs).last_hidden_state[0]
