"""Tests that compute on GPUs: each on one private Ray with all of the machine's; skipped where torch sees none."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest

os.environ.update(RAY_AUTH_MODE="disabled", RAY_ENABLE_AUTO_CONNECT="0")  # Ray reads these when it is imported
os.environ.pop("RAY_ADDRESS", None)


@pytest.fixture(scope="session")
def gpus() -> Iterator[int]:
    """How many there are, on a Ray that has them."""
    import torch

    count = torch.cuda.device_count()
    if not count:
        pytest.skip("torch sees no GPU: install requirements/cuda.txt on a machine with one")
    import ray

    folder = tempfile.mkdtemp(prefix="r", dir="/tmp")  # Ray's sockets need a short path
    os.environ["RAY_TMPDIR"] = folder
    ray.init(address="local", num_cpus=8, num_gpus=count, logging_level="ERROR", log_to_driver=False)
    yield count
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
