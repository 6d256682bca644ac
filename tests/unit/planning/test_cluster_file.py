"""Clusters: as NODES x GPUS x KIND, and from Ray's cluster files."""

from __future__ import annotations

import math
from datetime import date
from pathlib import Path

import pytest

from app.errors import ConfigError
from app.planning.cluster_file import cluster_from_file
from app.planning.hardware import MACHINES, cluster_from_spec


def test_cluster_specs() -> None:
    cluster = cluster_from_spec("4x8xH100-80GB")
    assert len(cluster.nodes) == 4 and cluster.nodes[0].gpus == 8 and cluster.nodes[0].name == "p5.48xlarge"
    half = cluster_from_spec("1x4xA100-80GB").nodes[0]
    assert (half.cpus, half.memory, half.price) == (48, 576 * 2**30, pytest.approx(13.7235, abs=1e-3))
    assert math.isclose(cluster.price(()) or 0, 4 * 55.04)


@pytest.mark.parametrize(
    ("spec", "message"),
    [("8xA100", "NODES x GPUS x KIND"), ("1x8xA100", "unknown GPU A100: known are A100-40GB"), ("0x8xA100-40GB", "at least one node")],
)
def test_bad_specs(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cluster_from_spec(spec)


def test_prices_have_a_day() -> None:
    assert all((machine.price is None) == (machine.read is None) for machine in MACHINES.values())
    assert all(machine.read is None or machine.read > date(2025, 1, 1) for machine in MACHINES.values())


def test_cluster_files(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(
        "max_workers: 3\nhead_node_type: head\navailable_node_types:\n"
        "  worker: {max_workers: 2, node_config: {InstanceType: p4de.24xlarge}}\n"
        "  spot: {max_workers: 4, node_config: {InstanceType: p4d.24xlarge}}\n"
        "  head: {node_config: {InstanceType: m6i.4xlarge}}\n"
    )
    cluster = cluster_from_file(file)
    assert [node.name for node in cluster.nodes] == ["m6i.4xlarge", "p4de.24xlarge", "p4de.24xlarge", "p4d.24xlarge"]


def test_workers_without_a_limit_of_their_own_may_be_as_many_as_all(tmp_path: Path) -> None:
    """As Ray reads it; the head is not among them."""
    file = tmp_path / "cluster.yaml"
    file.write_text(
        "max_workers: 4\nhead_node_type: head\navailable_node_types:\n"
        "  head: {node_config: {InstanceType: m6i.4xlarge}}\n"
        "  worker: {min_workers: 1, node_config: {InstanceType: p4de.24xlarge}}\n"
    )
    assert [node.name for node in cluster_from_file(file).nodes] == ["m6i.4xlarge", *["p4de.24xlarge"] * 4]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "cannot be read as YAML"),
        ("provider: {type: local}", "no available_node_types"),
        ("available_node_types: {x: {max_workers: 1}}", "head_node_type"),
        ("{available_node_types: {x: }, head_node_type: x}", "node type x"),
        ("{available_node_types: {x: {node_config: }}, head_node_type: x}", "unknown machine None"),
        (
            "{head_node_type: x, available_node_types: {x: {max_workers: 1, node_config: {InstanceType: z9.large}}}}",
            "unknown machine z9.large",
        ),
    ],
)
def test_bad_cluster_files(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        cluster_from_file(tmp_path / "c.yaml")
