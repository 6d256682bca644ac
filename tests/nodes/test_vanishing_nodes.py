"""What happens to the nodes of one PPO run. The tests share the run and come in this order: each does something to it and sees it go on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.command import MINIMAL, RUN_SECONDS, interrupt
from tests.nodes.cluster import REDIS, Cluster
from tests.nodes.conftest import Submitted
from tests.nodes.namespaces import Node
from tests.nodes.placement import PLACES
from tests.waiting import wait_until

GCS_AWAY_SECONDS = 5.0
MORE_STEPS = 2
"""That a run has to finish after a fault: the first may have been as good as done."""


@dataclass(frozen=True)
class Run:
    process: subprocess.Popen[bytes]
    log: Path

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        wait_until(condition, what, seconds=RUN_SECONDS, pause=0.3, process=self.process, log=self.log)

    def says(self, pattern: str) -> None:
        self.wait_until(lambda: re.search(pattern, self.log.read_text()) is not None, pattern)

    @property
    def steps(self) -> int:
        """PPO steps that it has told of."""
        return max((int(step) for step in re.findall(r"ppo +(\d+)/", self.log.read_text())), default=0)

    def goes_on(self) -> None:
        wanted = self.steps + MORE_STEPS
        self.wait_until(lambda: self.steps >= wanted, f"PPO step {wanted}")


@pytest.fixture(scope="module")
def run(cluster: Cluster, submitted: Submitted, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """PPO with room for one engine of the two it wants, stopped in the end as a user would."""
    folder = tmp_path_factory.mktemp("ppo")
    given = {
        "run.dir": folder / "run", "model.path": submitted.folder / "sft" / "model", "reward.path": submitted.folder / "rm" / "model",
        "rollout.engines.count": 2, "rollout.min_engines": 1, "ppo.steps": 100_000, "ppo.save_every": 1,
    }  # fmt: skip
    command = ["ppo", MINIMAL, *PLACES, *(f"--{key}={value}" for key, value in given.items())]
    started = Run(cluster.start(command, folder / "ppo.log"), folder / "ppo.log")
    try:
        started.goes_on()
        yield started
        assert interrupt(started.process, signal.SIGINT) == 130, started.log.read_text()
        assert "a checkpoint is saved, the same command goes on from it" in started.log.read_text()
    finally:
        started.process.kill()


def here(node: Node, kind: str) -> bool:
    return kind in node.actors().values()


def test_a_node_that_is_added_is_sampled_on(run: Run, cluster: Cluster) -> None:
    node = cluster.add("sample-2", role="sample", cpus=1)
    run.says(r"a rollout engine joined: 2 of 2 are up")
    assert here(node, "RolloutEngine") and here(cluster.node("sample-1"), "RolloutEngine")
    run.goes_on()


def test_a_node_with_an_engine_that_loses_its_network(run: Run, cluster: Cluster) -> None:
    cluster.node("sample-2").unplug()
    run.says(r"rollout engine \d died")
    run.goes_on()


def test_a_node_with_a_learner_that_loses_its_power(run: Run, cluster: Cluster) -> None:
    spare = cluster.add("learn-3", role="learn", cpus=2)
    cluster.node("learn-2").kill()
    run.says(r"learner rank \d died; the learner starts anew from the last checkpoint")
    run.goes_on()
    assert here(spare, "LearnerWorker")


@pytest.mark.skipif(REDIS is None, reason="Ray's state outlives its GCS only in Redis: install redis-server")
def test_a_gcs_that_comes_back(run: Run, cluster: Cluster) -> None:
    """A process is lost afterwards, so that Ray's state is needed again."""
    cluster.restart_gcs(GCS_AWAY_SECONDS)
    run.goes_on()
    told = run.log.read_text().count("the learner starts anew")
    (learner,) = [pid for pid, kind in cluster.node("learn-1").actors().items() if kind == "LearnerWorker"]
    os.kill(learner, signal.SIGKILL)
    run.wait_until(lambda: run.log.read_text().count("the learner starts anew") > told, "another learner")
    run.goes_on()
