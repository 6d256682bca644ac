"""Padding, masks and targets of the supervised batches."""

from __future__ import annotations

import numpy as np
import pytest

from app.data.collate import collate_groups, collate_threads
from app.data.token_cache import GroupRow, SftRow


def ids(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def test_threads_are_padded_on_the_right_to_a_multiple_of_8() -> None:
    long = SftRow(np.arange(1, 10, dtype=np.int32), np.arange(9) >= 4)
    short = SftRow(ids(7, 8, 9), np.array([True, False, True]))
    batch = collate_threads([long, short])
    assert batch.ids_BS.shape == (2, 16)
    assert batch.ids_BS[1].tolist() == [7, 8, 9, *[0] * 13]
    assert batch.positions_BS.tolist() == [list(range(16))] * 2
    assert batch.targets_BS[0].nonzero().flatten().tolist() == [4, 5, 6, 7, 8]
    assert batch.targets_BS[1].nonzero().flatten().tolist() == [2], "nothing predicts a first token"


@pytest.mark.parametrize(("multiple", "length"), [(1, 9), (8, 16), (16, 16), (24, 24)])
def test_padding_to_a_multiple(multiple: int, length: int) -> None:
    row = np.arange(1, 10, dtype=np.int32)
    assert collate_threads([SftRow(row, row > 4)], multiple=multiple).ids_BS.shape == (1, length)
    assert collate_groups([GroupRow("g", (row, row[:3]))], multiple=multiple).ids_NS.shape == (2, length)


def test_packed_threads_follow_on_in_one_row_and_count_their_own_positions() -> None:
    threads = [SftRow(np.arange(10 * i, 10 * i + n, dtype=np.int32), np.ones(n, np.bool_)) for i, n in enumerate((3, 5, 4), 1)]
    batch = collate_threads(threads, packed=True)
    assert batch.ids_BS.tolist() == [[10, 11, 12, 20, 21, 22, 23, 24, 30, 31, 32, 33, 0, 0, 0, 0]]
    assert batch.positions_BS.tolist() == [[0, 1, 2, 0, 1, 2, 3, 4, *range(8)]]
    assert batch.targets_BS.int().tolist() == [[0, 1, 1, 0, 1, 1, 1, 1, 0, 1, 1, 1, 0, 0, 0, 0]]


def test_groups_become_one_batch_best_first() -> None:
    rows = [GroupRow("a", (ids(1, 2), ids(1, 3, 4), ids(1))), GroupRow("b", (ids(5), ids(6, 7)))]
    batch = collate_groups(rows)
    assert batch.group_sizes == [3, 2]
    assert batch.ids_NS.shape == (5, 8)
    assert batch.attention_NS.sum(1).tolist() == [2, 3, 1, 1, 2]
    assert batch.ids_NS[4].tolist() == [6, 7, 0, 0, 0, 0, 0, 0]
