"""The environment of compute processes does what it is for."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from app.config.shared import WorkersConfig
from app.workers.processes import process_environment

VISIBLE_GPUS = """
import os
from types import SimpleNamespace
import ray
from ray._private.utils import set_visible_accelerator_ids

ray.get_runtime_context = lambda: SimpleNamespace(get_accelerator_ids=lambda: {"GPU": GIVEN})
set_visible_accelerator_ids()  # what Ray does in an actor's process before anything of ours
print(os.environ.get("CUDA_VISIBLE_DEVICES"))
"""

PAGE_FAULTS = """
import resource, threading
import numpy as np

def work():
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        np.ones(2**28, dtype=np.uint8)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are for glibc")
def test_memory_that_a_thread_frees_serves_it_again() -> None:
    """Ray Train computes in a thread; by default it gets new pages for each large tensor, 65,536 of them or 128 huge ones here."""
    environment = {**os.environ, **process_environment(WorkersConfig())}
    done = subprocess.run([sys.executable, "-c", PAGE_FAULTS], env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 20


@pytest.mark.parametrize(("gpus", "given", "visible"), [(0, [], ""), (0.5, ["3"], "3"), (2, ["1", "2"], "1,2")])
def test_a_process_sees_the_gpus_that_it_reserves_and_no_other(gpus: float, given: list[str], visible: str) -> None:
    """A learner that reserves none would compute on the first of those that it sees, beside whoever has it."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "0,1,2,3", **process_environment(WorkersConfig(gpus=gpus))}
    command = [sys.executable, "-c", VISIBLE_GPUS.replace("GIVEN", repr(given))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == visible
