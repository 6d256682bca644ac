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
"""S is a multiple of this, which matrix units like."""


class SftBatch(NamedTuple):
    """ids_BS int64; attention_BS bool; targets_BS bool, True where ids is a target of the loss."""

    ids_BS: torch.Tensor
    attention_BS: torch.Tensor
    targets_BS: torch.Tensor


class GroupBatch(NamedTuple):
    """ids_NS int64 and attention_NS bool, replies of one group after another, best first; group_sizes: replies of each group."""

    ids_NS: torch.Tensor
    attention_NS: torch.Tensor
    group_sizes: list[int]


def collate_threads(rows: Sequence[SftRow], device: torch.device | str = "cpu") -> SftBatch:
    """The first token of a row is never a target: nothing predicts it."""
    ids_BS, attention_BS = _pad([row.ids for row in rows])
    targets_BS = torch.zeros_like(attention_BS)
    for target, row in zip(targets_BS, rows, strict=True):
        target[1 : len(row.ids)] = torch.from_numpy(row.loss_mask[1:])
    return SftBatch(ids_BS.to(device), attention_BS.to(device), targets_BS.to(device))


def collate_groups(rows: Sequence[GroupRow], device: torch.device | str = "cpu") -> GroupBatch:
    """All replies of all groups in one batch."""
    ids_NS, attention_NS = _pad([sequence for row in rows for sequence in row.sequences])
    return GroupBatch(ids_NS.to(device), attention_NS.to(device), [len(row.sequences) for row in rows])


def _pad(sequences: Sequence[IntArray]) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    longest = -(-int(lengths.max()) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    ids = torch.zeros(len(sequences), longest, dtype=torch.int64)
    for row, sequence in zip(ids, sequences, strict=True):
        row[: len(sequence)] = torch.from_numpy(sequence.astype(np.int64))
    return ids, torch.arange(longest) < lengths[:, None]
