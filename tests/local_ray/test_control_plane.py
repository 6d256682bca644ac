"""A small version of the control-plane benchmark: what the controller hands to its workers grows no faster than the samples."""

from __future__ import annotations

import pytest

from bench.control_plane import Control, FakeCluster, Size

LENGTH, SMALL, LARGE = 64, 64, 512


@pytest.fixture(scope="module")
def measured() -> dict[int, Control]:
    """Samples per step -> what was measured, over 4 engines and 2 learner ranks."""
    cluster = FakeCluster(engines=4, learners=2, length=LENGTH)
    return {samples: cluster.measure(Size(4, 2, samples, LENGTH), steps=3, weight_bytes=2**20) for samples in (SMALL, LARGE)}


def test_only_batches_and_weights_lie_in_the_object_store(measured: dict[int, Control]) -> None:
    """The weights once, and per token of the batch at most twice what the experience holds of it: it is put there with and without
    credit; responses and answers of ranks are small enough to travel without it."""
    fields = 8 + 1 + 8 * 4 + 1  # ids, attention, eight float32 tensors, mask
    for samples, found in measured.items():
        tokens = samples * (256 + LENGTH)
        assert 2**20 <= found.stored_bytes <= 2**20 + 2 * fields * tokens + 2**20
