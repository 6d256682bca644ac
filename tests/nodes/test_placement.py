"""Commands on a cluster whose nodes have nothing in common but a network and the file system of the run folder."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file

from tests.e2e.command import MINIMAL
from tests.nodes.cluster import Cluster
from tests.nodes.conftest import Submitted
from tests.nodes.placement import PLACES

DOCTOR_SECONDS = 300


def test_the_doctor_finds_the_nodes_well_and_the_recipe_to_fit(cluster: Cluster, tmp_path: Path) -> None:
    log = tmp_path / "doctor.log"
    command = ["doctor", MINIMAL, f"--run.dir={tmp_path / 'run'}", *PLACES, "--json", "--address", cluster.address]
    process = cluster.start(command, log, joins=False)
    process.wait(DOCTOR_SECONDS)
    output = log.read_text()
    checks = json.loads(output[output.index("{") :])["checks"]
    assert [check for check in checks if check["remedy"]] == []
    found = {check["name"]: check["finding"] for check in checks}
    assert found["all-reduce (gloo)"].startswith("4 nodes"), output


def test_every_process_of_a_submitted_pipeline_sits_where_the_recipe_says(submitted: Submitted) -> None:
    seen = submitted.seen
    assert seen["RayTrainWorker"] == {"learn-1", "learn-2"}, "each rank of SFT and reward model on a node of its own"
    assert seen["LearnerWorker"] == {"learn-1", "learn-2"}
    assert seen["RolloutEngine"] == {"sample-1"}
    assert seen["ServeReplica"] and seen["ServeReplica"] <= {"learn-1", "learn-2"}


def test_a_submitted_pipeline_trains(submitted: Submitted) -> None:
    before, after = (load_file(submitted.folder / stage / "model" / "model.safetensors") for stage in ("sft", "ppo"))
    assert any(not before[name].equal(after[name]) for name in before)
    assert (submitted.folder / "summary.json").is_file()
