"""Commands on a cluster whose nodes have nothing in common but a network and the file system of the run folder."""

from __future__ import annotations

import json
from pathlib import Path

from tests.nodes.cluster import Cluster

DOCTOR_SECONDS = 300


def test_the_doctor_finds_every_node_well(cluster: Cluster, tmp_path: Path) -> None:
    log = tmp_path / "doctor.log"
    process = cluster.start(["doctor", "--json", "--address", cluster.address], log, joins=False)
    process.wait(DOCTOR_SECONDS)
    output = log.read_text()
    checks = json.loads(output[output.index("{") :])["checks"]
    assert [check for check in checks if check["name"].startswith("all-reduce")] == []
