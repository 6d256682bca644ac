"""Processes go to nodes with the labels that they ask for, and the check before a start knows them."""

from __future__ import annotations

import os

import pytest
import ray

from app.config.loading import with_values
from app.config.recipe import Recipe
from app.config.shared import WorkersConfig
from app.errors import PlacementError
from app.planning.placement import check_feasible
from app.workers.processes import process_options
from jobs import local_ray

PLENTY = {"CPU": 8.0, "GPU": 0.0}


def test_a_process_waits_for_a_node_with_its_labels() -> None:
    class Process:  # local, so that it travels as a whole: workers cannot import test modules
        def pid(self) -> int:
            return os.getpid()

    actor = ray.remote(Process)
    here = actor.options(**process_options(WorkersConfig(cpus=0.1, labels={"market-type": "on-demand"}))).remote()
    nowhere = actor.options(**process_options(WorkersConfig(cpus=0.1, labels={"market-type": "spot"}))).remote()
    try:
        assert ray.get(here.pid.remote(), timeout=60) != os.getpid()
        assert ray.wait([nowhere.pid.remote()], timeout=0.5)[0] == []
    finally:
        ray.kill(here)
        ray.kill(nowhere)


def test_the_check_before_a_start_reads_the_nodes_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    nodes = local_ray.cluster_nodes()
    assert [(node.cpus, node.gpus, node.labels["market-type"]) for node in nodes] == [(8.0, 4, "on-demand")]
    recipe = with_values(Recipe(), {"model.path": "runs/x/sft/model", "rollout.engines.labels": {"market-type": "on-demand"}})
    check_feasible(recipe, "samples", PLENTY, nodes)
    with pytest.raises(PlacementError, match="engine 1 of 1 needs a node with market-type=spot"):
        check_feasible(with_values(recipe, {"rollout.engines.labels": {"market-type": "spot"}}), "samples", PLENTY, nodes)
