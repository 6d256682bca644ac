"""Rows to padded tensors. Padding is on the right, its ids are 0 and the attention mask alone tells it apart.

Shape legend: B threads, N replies of all groups of a micro-batch, S tokens of the longest sequence, rounded up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from app.data.token_cache import GroupRow, SftRow
from app.experience import IntArray

LENGTH_MULTIPLE = 8
"""S is a multiple of this unless `data.pad_to_multiple` says otherwise; matrix units like it."""


class SftBatch(NamedTuple):
    """ids_BS int64; positions_BS int64, 0 where a thread begins; targets_BS bool, True where ids is a target of the loss."""

    ids_BS: torch.Tensor
    positions_BS: torch.Tensor
    targets_BS: torch.Tensor


class GroupBatch(NamedTuple):
    """ids_NS int64 and attention_NS bool, replies of one group after another, best first; group_sizes: replies of each group.

    own_NS is attention_NS without the tokens that all replies of a group begin with, which are the first reply's.
    """

    ids_NS: torch.Tensor
    attention_NS: torch.Tensor
    own_NS: torch.Tensor
    group_sizes: list[int]


def collate_threads(
    rows: Sequence[SftRow], device: torch.device | str = "cpu", *, packed: bool = False, multiple: int = LENGTH_MULTIPLE
) -> SftBatch:
    """One row per thread, or with `packed` all threads behind each other in one row.

    The first token of a thread is never a target: nothing predicts it. Padding counts its positions on, so that it belongs to
    the last thread of its row, none of whose tokens sees it.
    """
    groups = [list(rows)] if packed else [[row] for row in rows]
    ids_BS, _ = _pad([np.concatenate([row.ids for row in threads]) for threads in groups], multiple)
    positions_BS = torch.arange(ids_BS.shape[1]).repeat(len(groups), 1)
    targets_BS = torch.zeros(ids_BS.shape, dtype=torch.bool)
    for positions, targets, threads in zip(positions_BS, targets_BS, groups, strict=True):
        start = 0
        for row in threads:
            end = start + len(row.ids)
            positions[start:] -= int(positions[start])
            targets[start + 1 : end] = torch.from_numpy(row.loss_mask[1:])
            start = end
    return SftBatch(ids_BS.to(device), positions_BS.to(device), targets_BS.to(device))


def collate_groups(rows: Sequence[GroupRow], device: torch.device | str = "cpu", *, multiple: int = LENGTH_MULTIPLE) -> GroupBatch:
    """All replies of all groups in one batch."""
    ids_NS, attention_NS = _pad([sequence for row in rows for sequence in row.sequences], multiple)
    own_NS = attention_NS.clone()
    group_sizes = [len(row.sequences) for row in rows]
    for row, own in zip(rows, own_NS.split(group_sizes), strict=True):
        own[1:, : shared_prefix(row.sequences)] = False
    return GroupBatch(ids_NS.to(device), attention_NS.to(device), own_NS.to(device), group_sizes)


def shared_prefix(sequences: Sequence[IntArray]) -> int:
    """How many tokens all sequences begin with; each keeps at least one of its own.

    >>> shared_prefix([np.array([1, 2, 3]), np.array([1, 2, 4, 5])]), shared_prefix([np.array([1, 2]), np.array([1, 2])])
    (2, 1)
    """
    limit = min(len(sequence) for sequence in sequences) - 1
    differs = np.any([sequence[:limit] != sequences[0][:limit] for sequence in sequences], axis=0)
    return int(differs.argmax()) if differs.any() else limit


def _pad(sequences: Sequence[IntArray], multiple: int) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    longest = -(-int(lengths.max()) // multiple) * multiple
    ids = torch.zeros(len(sequences), longest, dtype=torch.int64)
    for row, sequence in zip(ids, sequences, strict=True):
        row[: len(sequence)] = torch.from_numpy(sequence.astype(np.int64))
    return ids, torch.arange(longest) < lengths[:, None]
