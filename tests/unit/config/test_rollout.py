"""What follows from the rollout keys about GPUs."""

from __future__ import annotations

import pytest

from app.config.rollout import RolloutConfig
from app.config.shared import WorkersConfig


@pytest.mark.parametrize(
    ("transfer", "gpus", "colocate", "over_nccl", "shares_gpus"),
    [
        ("auto", 0, False, False, False),
        ("auto", 1, False, True, False),
        ("auto", 0.5, False, True, False),
        ("auto", 1, True, False, True),
        ("auto", 0, True, False, False),
        ("object_store", 1, False, False, False),
        ("nccl", 1, False, True, False),
    ],
)
def test_weights_go_over_nccl_to_engines_that_own_their_gpus(
    transfer: str, gpus: float, colocate: bool, over_nccl: bool, shares_gpus: bool
) -> None:
    config = RolloutConfig.model_validate({"transfer": transfer, "engines": {"gpus": gpus}, "colocate": colocate})
    assert (config.over_nccl, config.shares_gpus) == (over_nccl, shares_gpus)


@pytest.mark.parametrize(("gpus", "parallel"), [(0, 1), (0.5, 1), (1, 1), (4, 4)])
def test_an_engine_splits_its_model_over_its_whole_gpus(gpus: float, parallel: int) -> None:
    assert WorkersConfig(gpus=gpus).tensor_parallel == parallel
