"""Where a recipe wants its processes on the cluster of these tests, and where they are seen."""

from __future__ import annotations

import subprocess
import time
from collections import defaultdict

from tests.e2e.command import RUN_SECONDS
from tests.nodes.cluster import Cluster

RANKS = ("sft.workers", "rm.workers", "ppo.workers")
SCORING = ("scoring.reward", "scoring.reference")
PLACES = [
    *(f"--{role}.labels.role=learn" for role in (*RANKS, *SCORING)),
    *(f"--{ranks}.{value}" for ranks in RANKS for value in ("count=2", "cpus=1.5")),  # of a node's 2 CPUs: each rank sits alone
    "--rollout.engines.labels.role=sample",
    "--rollout.engines.cpus=1",
]


def whereabouts(cluster: Cluster, process: subprocess.Popen[bytes]) -> dict[str, set[str]]:
    """Watch the nodes while a command runs: kind of actor -> names of the nodes on which one was seen."""
    seen: dict[str, set[str]] = defaultdict(set)
    end = time.monotonic() + RUN_SECONDS
    while process.poll() is None:
        assert time.monotonic() < end
        for node in cluster.network.nodes:
            for kind in node.actors().values():
                seen[kind].add(node.name)
        time.sleep(0.3)
    return seen
