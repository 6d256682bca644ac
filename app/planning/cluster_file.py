"""The nodes that a Ray cluster file asks for, at its most: `cluster.yaml` and its kin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from app.errors import ConfigError
from app.planning.hardware import MACHINES, Cluster, Machine

TYPE_KEYS = ("InstanceType", "machineType")  # AWS, GCP
DEFAULT_MAX_WORKERS = 2  # Ray's


def cluster_from_file(path: Path) -> Cluster:
    """Head and workers of a cluster file: those that it starts with, then those that it may grow to.

    Raises ConfigError for a file that is none, and for machines that the table does not know.
    """
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--cluster {path}: cannot be read as YAML ({str(error).splitlines()[0]}): give a Ray cluster file") from error
    types = document.get("available_node_types") if isinstance(document, Mapping) else None
    if not isinstance(types, Mapping):
        raise ConfigError(
            f"--cluster {path}: has no available_node_types, so it does not say which machines it starts: "
            "write them as NODES x GPUS x KIND, such as 2x8xA100-80GB"
        )
    head = document.get("head_node_type")
    workers = {name: entry for name, entry in types.items() if name != head}
    nodes = [_machine(path, name, entry) for name, entry in types.items() if name == head]
    growing: list[Machine] = []
    for name, entry in workers.items():
        first = int(entry.get("min_workers", 0))
        nodes += [_machine(path, name, entry)] * first
        growing += [_machine(path, name, entry)] * (int(entry.get("max_workers", first)) - first)
    room = int(document.get("max_workers", DEFAULT_MAX_WORKERS)) - (len(nodes) - 1)
    return Cluster(str(path), (*nodes, *growing[: max(0, room)]), elastic=True)


def _machine(path: Path, name: str, entry: Mapping[str, Any]) -> Machine:
    config = entry.get("node_config", {})
    kind = next((str(config[key]).rsplit("/", 1)[-1] for key in TYPE_KEYS if key in config), None)
    if kind not in MACHINES:
        raise ConfigError(
            f"--cluster {path}: node type {name}: unknown machine {kind}: known are {', '.join(MACHINES)}; "
            "or write the cluster as NODES x GPUS x KIND, such as 2x8xA100-80GB"
        )
    return replace(MACHINES[kind], labels=entry.get("labels", {}))
