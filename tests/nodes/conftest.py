"""What the tests share: a cluster of a head that computes nothing, two nodes that learn and one that samples, and a pipeline on it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.command import MINIMAL
from tests.nodes.cluster import Cluster
from tests.nodes.namespaces import Network
from tests.nodes.placement import PLACES, whereabouts


@pytest.fixture(scope="session")
def switch() -> Iterator[Network]:
    if not sys.platform.startswith("linux") or shutil.which("ip") is None:
        pytest.skip("network namespaces need Linux and `ip` of iproute2")
    if os.geteuid():
        pytest.skip("network namespaces need root")
    folder = Path(tempfile.mkdtemp(prefix="cn", dir="/tmp"))
    try:
        made = Network(folder)
    except subprocess.CalledProcessError as error:
        shutil.rmtree(folder)
        pytest.skip(f"no network can be made here: {error.stderr.strip()}")
    try:
        yield made
    finally:
        made.close()
        shutil.rmtree(folder)


@dataclass(frozen=True)
class Submitted:
    """The run folder of a finished pipeline, and on which nodes each kind of actor was seen."""

    folder: Path
    seen: dict[str, set[str]]


@pytest.fixture(scope="session")
def cluster(switch: Network) -> Cluster:
    """A rank takes more than half of a node that learns, so that two of them sit on two."""
    made = Cluster(switch)
    made.add("learn-1", role="learn", cpus=2)
    made.add("learn-2", role="learn", cpus=2)
    made.add("sample-1", role="sample", cpus=1)
    return made


@pytest.fixture(scope="session")
def submitted(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Submitted:
    """Every stage, as a job."""
    folder = tmp_path_factory.mktemp("pipeline")
    run, log = folder / "run", folder / "submit.log"
    process = cluster.start(["submit", MINIMAL, "--address", cluster.dashboard, f"--run.dir={run}", *PLACES], log, joins=False)
    seen = whereabouts(cluster, process)
    assert process.returncode == 0, log.read_text()
    return Submitted(run, seen)
