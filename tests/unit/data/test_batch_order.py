"""Which row comes when: by seed and step alone, and the same rows on any number of workers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.data.batch_order import PassLimit, RowShape, evaluation_batches, micro_batches, step_rows, total_steps
from app.data.mixture import Mixture


@pytest.mark.parametrize(
    ("epochs", "batch_size", "max_steps", "expected"),
    [(1.0, 10, None, 10), (1.0, 30, None, 4), (0.5, 10, None, 5), (2.0, 10, 7, 7), (0.001, 10, None, 1), (1.0, 1000, None, 1)],
)
def test_total_steps_of_100_rows(epochs: float, batch_size: int, max_steps: int | None, expected: int) -> None:
    assert total_steps(100, epochs=epochs, batch_size=batch_size, max_steps=max_steps) == expected


@settings(deadline=None)
@given(rows=st.integers(1, 40), batch_size=st.integers(1, 50), seed=st.integers(0, 5))
def test_every_epoch_holds_every_row_once(rows: int, batch_size: int, seed: int) -> None:
    stream = [
        row for step in range(2 * rows) for row in step_rows(step, mixture=Mixture.of([""] * rows, {}), batch_size=batch_size, seed=seed)
    ]
    for start in range(0, len(stream) - rows + 1, rows):
        assert sorted(stream[start : start + rows]) == list(range(rows))


def test_order_depends_on_seed_and_epoch() -> None:
    def epoch(seed: int, number: int) -> list[int]:
        return step_rows(number, mixture=Mixture.of([""] * 50, {}), batch_size=50, seed=seed)

    assert epoch(1, 0) == epoch(1, 0)
    assert len({tuple(epoch(1, 0)), tuple(epoch(1, 1)), tuple(epoch(2, 0))}) == 3


def singles(lengths: Sequence[int]) -> list[RowShape]:
    return [RowShape(1, length, length) for length in lengths]


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 99), min_size=24, max_size=24), world_size=st.sampled_from([1, 2, 3]), micro=st.sampled_from([1, 2, 4])
)
def test_workers_share_a_step_evenly_and_completely(lengths: list[int], world_size: int, micro: int) -> None:
    indices = list(range(23, -1, -1))
    shares = [micro_batches(indices, singles(lengths), PassLimit(micro), rank=rank, world_size=world_size) for rank in range(world_size)]
    assert {len(share) for share in shares} == {24 // (micro * world_size)}
    assert all(len(batch) == micro for share in shares for batch in share)
    assert Counter(i for share in shares for batch in share for i in batch) == Counter(indices)


SHAPES = st.lists(
    st.tuples(st.integers(1, 4), st.integers(1, 40)).map(lambda shape: RowShape(shape[0], shape[1], shape[0] * shape[1])),
    min_size=12,
    max_size=12,
)


@settings(deadline=None)
@given(shapes=SHAPES, world_size=st.sampled_from([1, 2, 3, 4]), tokens=st.integers(1, 300), padded=st.booleans())
def test_passes_keep_their_token_budget(shapes: list[RowShape], world_size: int, tokens: int, padded: bool) -> None:
    limit = PassLimit(1, tokens, padded)
    shares = [micro_batches(range(12), shapes, limit, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    batches = [[shapes[i] for i in batch] for share in shares for batch in share]
    assert sorted(row for batch in batches for row in batch) == sorted(shapes)
    for rows in batches:
        computed = sum(row.sequences for row in rows) * max(row.longest for row in rows) if padded else sum(row.tokens for row in rows)
        assert len(rows) == 1 or computed <= tokens


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=12, max_size=12),
    beginnings=st.lists(st.sampled_from("abc"), min_size=12, max_size=12),
    world_size=st.sampled_from([1, 2, 4]),
    limit=st.integers(1, 300).map(lambda tokens: PassLimit(1, tokens, padded=False)) | st.just(PassLimit(3, padded=False)),
)
def test_beginnings_change_neither_shares_nor_budgets(lengths: list[int], beginnings: list[str], world_size: int, limit: PassLimit) -> None:
    shapes = singles(lengths)
    shares = [
        micro_batches(range(12), shapes, limit, rank=rank, world_size=world_size, beginnings=beginnings) for rank in range(world_size)
    ]
    assert len({len(share) for share in shares}) == 1
    assert sorted(i for share in shares for batch in share for i in batch) == list(range(12))
    for batch in (batch for share in shares for batch in share):
        assert 1 <= len(batch) <= (12 if limit.tokens else limit.rows)
        assert not limit.tokens or len(batch) == 1 or sum(lengths[i] for i in batch) <= limit.tokens


@pytest.mark.parametrize("limit", [PassLimit(4, padded=False), PassLimit(1, 100, padded=False)], ids=["rows", "tokens"])
def test_rows_that_begin_alike_share_a_pass(limit: PassLimit) -> None:
    shapes = singles([24, 20, 22, 26, 21, 25, 23, 19])
    shares = [micro_batches(range(8), shapes, limit, rank=rank, world_size=2, beginnings="abababab") for rank in range(2)]
    assert sorted(sorted(batch) for share in shares for batch in share) == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_packed_passes_are_few_and_alike() -> None:
    shapes = singles([50, 10, 30, 30, 20, 40, 10, 10])
    shares = [micro_batches(range(8), shapes, PassLimit(1, 100, padded=False), rank=rank, world_size=2) for rank in range(2)]
    assert [[sum(shapes[i].tokens for i in batch) for batch in share] for share in shares] == [[100], [100]]


def test_padded_passes_are_split_until_every_worker_has_one() -> None:
    shapes = singles([8, 8, 8, 8])
    shares = [micro_batches(range(4), shapes, PassLimit(1, 32), rank=rank, world_size=4) for rank in range(4)]
    assert sorted(shares) == [[[0]], [[1]], [[2]], [[3]]]


def test_micro_batches_hold_rows_of_similar_length() -> None:
    lengths = [9, 1, 8, 2, 7, 3, 6, 4]
    first = micro_batches(range(8), singles(lengths), PassLimit(2), rank=0, world_size=2)
    second = micro_batches(range(8), singles(lengths), PassLimit(2), rank=1, world_size=2)
    assert [[lengths[i] for i in batch] for batch in first + second] == [[1, 2], [6, 7], [3, 4], [8, 9]]


def test_uneven_shares_are_refused() -> None:
    with pytest.raises(ValueError, match="do not divide"):
        micro_batches(range(6), singles([1] * 6), PassLimit(2), rank=0, world_size=2)


@settings(deadline=None)
@given(rows=st.integers(1, 30), world_size=st.integers(1, 4), micro=st.integers(1, 5), tokens=st.none() | st.integers(1, 20))
def test_evaluation_sees_every_row_once_in_equally_many_batches(rows: int, world_size: int, micro: int, tokens: int | None) -> None:
    shapes = singles([1 + i % 7 for i in range(rows)])
    shares = [evaluation_batches(shapes, PassLimit(micro, tokens), rank=rank, world_size=world_size) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(i for share in shares for batch in share for i in batch) == list(range(rows))
