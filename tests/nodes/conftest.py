"""The cluster that all tests share: a head that computes nothing, two nodes that learn, and one that samples."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.nodes.cluster import Cluster
from tests.nodes.namespaces import Network, network


@pytest.fixture(scope="session")
def switch() -> Iterator[Network]:
    if not sys.platform.startswith("linux") or shutil.which("ip") is None:
        pytest.skip("network namespaces need Linux and `ip` of iproute2")
    if os.geteuid():
        pytest.skip("network namespaces need root")
    folder = Path(tempfile.mkdtemp(prefix="cn", dir="/tmp"))
    try:
        with network(folder) as made:
            yield made
    except subprocess.CalledProcessError as error:
        if error.cmd[:4] != ["ip", "link", "add", f"cn{os.getpid()}"]:
            raise
        pytest.skip(f"this machine makes no bridge: {error.stderr.strip()}")
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def cluster(switch: Network) -> Cluster:
    """A rank takes more than half of a node that learns, so that two of them sit on two."""
    made = Cluster(switch)
    made.add("learn-1", role="learn", cpus=2)
    made.add("learn-2", role="learn", cpus=2)
    made.add("sample-1", role="sample", cpus=1)
    return made
