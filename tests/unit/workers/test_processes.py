"""The environment of compute processes does what it is for."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from app.config.shared import WorkersConfig
from app.workers.processes import process_environment

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
