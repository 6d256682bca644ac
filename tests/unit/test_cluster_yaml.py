"""`cluster.yaml` under Ray's own loader, without a cloud."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.config.loading import load_recipe
from app.planning.memory import GIB
from app.planning.placement import check_feasible

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config: dict[str, Any] = prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text()))
    validate_config(config)
    return config


def test_a_cpu_head_and_eight_gpu_workers(cluster: dict[str, Any]) -> None:
    gpus = {name: node["resources"].get("GPU", 0) for name, node in cluster["available_node_types"].items()}
    assert gpus.pop(cluster["head_node_type"]) == 0
    assert list(gpus.values()) == [8]


def test_the_smallest_cluster_fits_the_pythia_recipes(cluster: dict[str, Any]) -> None:
    types = cluster["available_node_types"].values()
    have = {name: float(sum(node["resources"].get(name, 0) * node.get("min_workers", 1) for node in types)) for name in ("CPU", "GPU")}
    for path in sorted((ROOT / "jobs" / "recipes" / "pythia").glob("[!b]*.toml")):
        check_feasible(load_recipe(path), path.stem.split("-")[0], have | {"memory": 1100.0 * GIB})


def test_nodes_authenticate_and_install_the_gpu_lock(cluster: dict[str, Any]) -> None:
    for command in (cluster["head_start_ray_commands"][-1], cluster["worker_start_ray_commands"][-1]):
        assert "RAY_AUTH_MODE=token" in command
    pin = re.search(r'"(torch==[\d.]+)"', (ROOT / "pyproject.toml").read_text())
    setup = "\n".join(cluster["setup_commands"])
    assert pin is not None
    assert pin[1] in setup
    assert "requirements/cuda.txt" in setup
