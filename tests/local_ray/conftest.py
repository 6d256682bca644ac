"""One private Ray for all tests of this folder, gone before the next folder starts its own."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest

# Ray reads these when it is imported.
os.environ.update(RAY_AUTH_MODE="disabled", RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.1", DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # a thread of Serve's that outlives the cluster would start another one
os.environ.pop("RAY_ADDRESS", None)


@pytest.fixture(scope="package", autouse=True)
def cluster() -> Iterator[None]:
    import ray

    folder = tempfile.mkdtemp(prefix="r", dir="/tmp")  # Ray's sockets need a short path
    os.environ["RAY_TMPDIR"] = folder
    context = ray.init(
        address="local",
        num_cpus=8,
        num_gpus=4,  # logical ones: nothing here computes on them
        labels={"market-type": "on-demand"},
        object_store_memory=200 * 2**20,
        logging_level="ERROR",
        log_to_driver=False,
    )
    os.environ["RAY_API_SERVER_ADDRESS"] = f"http://{context.dashboard_url}"  # there may be other Rays on the machine
    yield
    del os.environ["RAY_API_SERVER_ADDRESS"]
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
