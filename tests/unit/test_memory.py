"""Peak memory of a process tree."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from app.workers.memory import PeakMemory, process_tree, proportional_bytes

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs /proc/PID/smaps_rollup")

MIB = 1 << 20
HOLDS_80_MIB = (
    "import sys; block = bytearray(80 << 20); block[::4096] = b'x' * len(block[::4096]); print('ready', flush=True); sys.stdin.read()"
)


@contextmanager
def child(code: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline()
        yield process
    finally:
        process.communicate()


def test_counts_a_child_and_remembers_the_peak_after_it_ends() -> None:
    memory = PeakMemory()
    alone = memory.sample()
    with child(HOLDS_80_MIB) as process:
        assert process.pid in process_tree([os.getpid()])
        with_child = memory.sample()
    assert 80 * MIB <= with_child - alone < 140 * MIB
    assert memory.sample() < with_child - 70 * MIB
    assert memory.peak_bytes == with_child
    assert memory.peak_processes >= 2


def test_the_cheap_sample_sees_every_new_peak() -> None:
    memory = PeakMemory()
    before = memory.sample()
    with child(HOLDS_80_MIB):
        memory.sample_if_higher()
        first = memory.peak_bytes
        assert first >= before + 80 * MIB
    memory.sample_if_higher()
    assert memory.peak_bytes == first
    with child(HOLDS_80_MIB), child(HOLDS_80_MIB):
        memory.sample_if_higher()
    assert memory.peak_bytes >= first + 70 * MIB


def test_grandchildren_count() -> None:
    nested = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {HOLDS_80_MIB!r}])"
    memory = PeakMemory()
    alone = memory.sample()
    with child(nested):
        assert memory.sample() - alone >= 80 * MIB


def test_shared_pages_count_once() -> None:
    # Four forks of a process with 80 MiB share its pages: the sum must not be five times as large.
    forking = (
        "import os, sys, time\nblock = bytearray(80 << 20)\nblock[::4096] = b'x' * len(block[::4096])\n"
        "kids = []\nfor _ in range(4):\n    pid = os.fork()\n    if pid == 0:\n        time.sleep(60); os._exit(0)\n    kids.append(pid)\n"
        "print('ready', flush=True); sys.stdin.read()\nfor pid in kids: os.kill(pid, 9)\n"
    )
    with child(forking) as process:
        pids = process_tree([process.pid])
        assert len(pids) == 5
        assert sum(map(proportional_bytes, pids)) < 140 * MIB


def test_extra_roots_and_vanished_processes() -> None:
    with child(HOLDS_80_MIB) as process:
        memory = PeakMemory(extra_roots=[process.pid])
        memory.sample()
        assert memory.peak_bytes >= 80 * MIB
    assert proportional_bytes(process.pid) == 0
    memory.sample()  # a root that has ended is no error


def test_samples_in_the_background_and_stops() -> None:
    with PeakMemory(interval_seconds=0.02) as memory, child(HOLDS_80_MIB):
        threading.Event().wait(0.2)
    assert memory.peak_bytes >= 80 * MIB
    assert not any(thread.name == "peak-memory" for thread in threading.enumerate())
