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
    """ids_NS int64 and attention_NS bool, replies of one group after another, best first; group_sizes: replies of each group."""

    ids_NS: torch.Tensor
    attention_NS: torch.Tensor
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
    return GroupBatch(ids_NS.to(device), attention_NS.to(device), [len(row.sequences) for row in rows])


def _pad(sequences: Sequence[IntArray], multiple: int) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    longest = -(-int(lengths.max()) // multiple) * multiple
    ids = torch.zeros(len(sequences), longest, dtype=torch.int64)
    for row, sequence in zip(ids, sequences, strict=True):
        row[: len(sequence)] = torch.from_numpy(sequence.astype(np.int64))
    return ids, torch.arange(longest) < lengths[:, None]
