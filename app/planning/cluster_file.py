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
    if head not in types:
        raise ConfigError(
            f"--cluster {path}: head_node_type = {head} is none of its available_node_types, {', '.join(map(str, types))}: mend it"
        )
    workers = {name: entry for name, entry in types.items() if name != head}
    nodes = [_machine(path, head, types[head])]
    growing: list[Machine] = []
    most = int(document.get("max_workers", DEFAULT_MAX_WORKERS))
    for name, entry in workers.items():
        machine = _machine(path, name, entry)
        first = int(entry.get("min_workers", 0))
        nodes += [machine] * first
        growing += [machine] * (int(entry.get("max_workers", most)) - first)
    return Cluster(str(path), (*nodes, *growing[: max(0, most - (len(nodes) - 1))]), elastic=True)


def _machine(path: Path, name: str, entry: Any) -> Machine:
    if not isinstance(entry, Mapping):
        raise ConfigError(f"--cluster {path}: node type {name} says nothing of its machine: give it a node_config")
    config = entry.get("node_config") or {}
    kind = next((str(config[key]).rsplit("/", 1)[-1] for key in TYPE_KEYS if key in config), None)
    if kind not in MACHINES:
        raise ConfigError(
            f"--cluster {path}: node type {name}: unknown machine {kind}: known are {', '.join(MACHINES)}; "
            "or write the cluster as NODES x GPUS x KIND, such as 2x8xA100-80GB"
        )
    return replace(MACHINES[kind], labels=entry.get("labels") or {})
