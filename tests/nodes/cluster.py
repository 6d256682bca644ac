"""A Ray cluster of `ray start` on the nodes of a network."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil

from tests.e2e.command import environment, start
from tests.nodes.namespaces import SECONDS, Network, Node

GCS_PORT, DASHBOARD_PORT, REDIS_PORT = 6379, 8265, 6380
STORE_BYTES = 150 * 2**20
REDIS = shutil.which("redis-server")


class Cluster:
    """A head that computes nothing, and workers with labels. The head's state is in Redis where that is installed."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.head = network.add("head")
        self.address = f"{self.head.address}:{GCS_PORT}"
        self.dashboard = f"http://{self.head.address}:{DASHBOARD_PORT}"
        self.environment = environment(
            RAY_AUTH_MODE="token",
            RAY_AUTH_TOKEN=secrets.token_hex(16),
            RAY_TMPDIR=str(network.temporary),
            PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            OMP_NUM_THREADS="1",
        )
        storage = {}
        if REDIS:
            persistence = ("--save", "", "--appendonly", "no", "--protected-mode", "no")
            self.head.run(
                [REDIS, "--bind", self.head.address, "--port", str(REDIS_PORT), "--daemonize", "yes", *persistence], self.environment
            )
            storage["RAY_REDIS_ADDRESS"] = f"{self.head.address}:{REDIS_PORT}"
        options = ["--head", f"--port={GCS_PORT}", f"--dashboard-host={self.head.address}", f"--dashboard-port={DASHBOARD_PORT}"]
        self._ray_start(self.head, [*options, "--num-cpus=0"], storage)
        self._gcs = psutil.Process(self.head.pid_of("gcs_server"))

    def add(self, name: str, *, role: str, cpus: int) -> Node:
        """A worker node; `name` and `role` are labels of it."""
        node = self.network.add(name)
        options = [f"--address={self.address}", f"--num-cpus={cpus}", f"--labels=role={role},name={name}"]
        self._ray_start(node, options, {})
        return node

    def node(self, name: str) -> Node:
        (found,) = [node for node in self.network.nodes if node.name == name]
        return found

    def _ray_start(self, node: Node, options: list[str], more: dict[str, str]) -> None:
        common = [f"--node-ip-address={node.address}", f"--object-store-memory={STORE_BYTES}", "--disable-usage-stats"]
        node.run(["ray", "start", *common, *options], self.environment | more)

    def start(self, arguments: list[str], log: Path, *, joins: bool = True) -> subprocess.Popen[bytes]:
        """A `corral` command in the background, on the head. joins: told of the cluster by RAY_ADDRESS."""
        log.touch()
        more = {"RAY_ADDRESS": self.address} if joins else {}
        return start(arguments, log, self.environment | more, inside=self.head.inside())

    def restart_gcs(self, seconds: float) -> None:
        """Kill the GCS, and start it again as it was after so many seconds."""
        words, env = self._gcs.cmdline(), self._gcs.environ()
        self._gcs.kill()
        psutil.wait_procs([self._gcs], timeout=SECONDS)
        time.sleep(seconds)
        with (self.head.folder / "gcs.log").open("ab") as out:
            again = subprocess.Popen([*self.head.inside(), *words], env=env, stdout=out, stderr=out)
        self._gcs = psutil.Process(again.pid)
