"""Probes on all nodes of a running cluster, with a deadline on every wait; a node that does not answer is named."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from app.errors import first_line
from app.workers.processes import NOTHING_COMPILED
from jobs.diagnosis.check import Check
from jobs.diagnosis.judging import SHOWN, Clock, Link, Locks, judge_clocks, judge_links, judge_node, judge_nodes
from jobs.diagnosis.node_report import NodeReport
from jobs.diagnosis.probe import NodeProbe

CLOCK_QUESTIONS = 5
CONNECT_SECONDS = 5.0
PATIENCE = 0.8  # of a deadline: torch gives up before we do, and says why


@dataclass(frozen=True)
class Answers:
    """What the nodes answered to one question, and why others did not, both by node."""

    values: Mapping[str, Any]
    errors: Mapping[str, str]

    def failures(self, name: str, remedy: str) -> list[Check]:
        return [Check(name, error, remedy, node) for node, error in self.errors.items()]


@dataclass(frozen=True)
class Probes:
    """One actor per node, by the node's name."""

    actors: Mapping[str, Any]
    seconds: float

    def ask(self, method: str, arguments: Mapping[str, tuple[Any, ...]]) -> Answers:
        """Call `method` on every node of `arguments` at once; each has until the deadline."""
        calls = {node: getattr(self.actors[node], method).remote(*given) for node, given in arguments.items()}
        ray.wait(list(calls.values()), num_returns=len(calls), timeout=self.seconds)
        values, errors = {}, {}
        for node, call in calls.items():
            try:
                values[node] = ray.get(call, timeout=0.1)
            except ray.exceptions.GetTimeoutError:
                errors[node] = f"no answer within {self.seconds:g} s"
            except ray.exceptions.RayError as error:
                errors[node] = first_line(error.cause if isinstance(error, ray.exceptions.RayTaskError) else error)
        return Answers(values, errors)

    def ask_all(self, method: str, *arguments: Any) -> Answers:
        return self.ask(method, dict.fromkeys(self.actors, arguments))

    def among(self, nodes: Sequence[str]) -> Probes:
        return Probes({node: self.actors[node] for node in nodes}, self.seconds)


def living_nodes() -> dict[str, dict[str, Any]]:
    """Ray's entry of every node by its name: the address, with the beginning of its id where several have the same."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    addresses = [node["NodeManagerAddress"] for node in nodes]
    named = {}
    for node, address in zip(nodes, addresses, strict=True):
        named[address if addresses.count(address) == 1 else f"{address} ({node['NodeID'][:6]})"] = node
    return named


@contextmanager
def probes(nodes: Mapping[str, Mapping[str, Any]], seconds: float, *, gpus: int = 0) -> Iterator[Probes]:
    """Start one on each node, with so many GPUs of its own; their processes end with the block."""
    actor = ray.remote(NodeProbe)

    def start(node: Mapping[str, Any]) -> Any:
        pinned = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        options = {"num_cpus": 0, "num_gpus": gpus, "scheduling_strategy": pinned, "runtime_env": {"env_vars": NOTHING_COMPILED}}
        return actor.options(**options).remote(node["NodeManagerAddress"], node["Resources"].get("GPU", 0.0))

    actors = {name: start(node) for name, node in nodes.items()}
    try:
        yield Probes(actors, seconds)
    finally:
        for each in actors.values():
            ray.kill(each)


def cluster_checks(locks: Locks, disks: Mapping[str, str], shared: str | None, seconds: float) -> Iterator[Check]:
    """Every check of the nodes of the cluster that this process has joined.

    disks: what for -> path; shared: a folder that all nodes have to see; seconds: deadline of each question.
    """
    nodes = living_nodes()
    with probes(nodes, seconds) as everywhere:
        answers = everywhere.ask_all("report", disks)
        yield from answers.failures("answer", "look at its raylet (`ray status`), and at what else runs there")
        reports: Mapping[str, NodeReport] = answers.values
        for node, report in reports.items():
            yield from judge_node(report, locks, node)
        if not reports:
            return
        yield from judge_nodes(reports)
        answering = everywhere.among(list(reports))
        yield from judge_clocks(clocks(answering))
        if len(reports) > 1:
            if shared is not None:
                yield shared_folder(answering, shared)
            yield from between_nodes(answering)
    with_gpus = {node: nodes[node] for node, report in reports.items() if report.gpus and report.counted_gpus >= 1}
    if len(with_gpus) > 1:
        with probes(with_gpus, seconds, gpus=1) as owning:
            yield from all_reduce(owning, "nccl")


def clocks(probes: Probes) -> dict[str, Clock]:
    """Of every node that answers: by the quickest of a few questions, whose answer was read in the middle of its way."""
    best: dict[str, Clock] = {}
    for _ in range(CLOCK_QUESTIONS):
        for node in probes.actors:
            asked = time.time()
            answers = probes.among([node]).ask_all("clock")
            way = (time.time() - asked) / 2
            if node in answers.values and (node not in best or way < best[node].error):
                best[node] = Clock(answers.values[node] - (asked + way), way)
    return best


def shared_folder(probes: Probes, path: str) -> Check:
    """Whether what this machine writes into the folder, or the nearest one above it, is seen on every node."""
    place = Path(path).absolute()
    folder = next(each for each in (place, *place.parents) if each.is_dir())
    marker = folder / f".corral-doctor-{uuid.uuid4().hex}"
    try:
        marker.touch()
    except OSError as error:
        return Check("shared folder", f"{folder}: {error.strerror}", "make it writable, or set run.dir to a folder that is")
    try:
        answers = probes.ask_all("sees", str(marker))
    finally:
        marker.unlink()
    blind = [node for node, sees in answers.values.items() if not sees]
    if blind:
        return Check("shared folder", f"{folder} is another one on {', '.join(blind)}", "set run.dir to a path that all nodes share")
    return Check("shared folder", f"{folder} is the same on {len(answers.values)} nodes")


def between_nodes(probes: Probes) -> Iterator[Check]:
    """Connections in both directions of every pair, then a sum over all nodes."""
    places = probes.ask_all("listen")
    yield from places.failures("port", "start its Ray with --node-ip-address = an address of it")
    nodes = list(places.values)
    targets = {node: [other for other in nodes if other != node] for node in nodes}
    patience = min(CONNECT_SECONDS, probes.seconds / max(1, len(nodes)))
    asked = {node: ([places.values[other] for other in others], patience) for node, others in targets.items()}
    answers = probes.among(nodes).ask("reach", asked)
    yield from answers.failures("connections", "look at its network")
    links = [Link(node, other, error) for node, row in answers.values.items() for other, error in zip(targets[node], row, strict=True)]
    yield from judge_links(links)
    if all(link.error is None for link in links):
        yield from all_reduce(probes.among(nodes), "gloo")


def all_reduce(probes: Probes, backend: str) -> Iterator[Check]:
    """A sum over all nodes, computed by torch.distributed; where it fails, the pairs of the first node that fail by themselves."""
    nodes = list(probes.actors)
    together = _sum(probes, backend)
    if together.failed and len(nodes) > 2:
        pairs = (_sum(probes.among([nodes[0], other]), backend) for other in nodes[1:])
        yield from islice((pair for pair in pairs if pair.failed), SHOWN)
    yield together


def _sum(probes: Probes, backend: str) -> Check:
    nodes = list(probes.actors)
    name = f"all-reduce ({backend})"
    variable = "NCCL_SOCKET_IFNAME" if backend == "nccl" else "GLOO_SOCKET_IFNAME"
    remedy = f"free a GPU on every node, or set {variable} there" if backend == "nccl" else f"set {variable} on each node"
    remedy += " to the interface of its address"
    meeting = probes.among(nodes[:1]).ask_all("free_port")
    answers = meeting
    if not meeting.errors:
        (place,) = meeting.values.values()
        limit = PATIENCE * probes.seconds
        answers = probes.ask("all_reduce", {node: (rank, len(nodes), place, backend, limit) for rank, node in enumerate(nodes)})
    if answers.errors:
        told = "; ".join(f"{node}: {error}" for node, error in answers.errors.items())
        return Check(name, f"among {', '.join(nodes)}: {told}", remedy)
    sums = {total for total, _ in answers.values.values()}
    if sums != {float(len(nodes))}:
        return Check(name, f"{len(nodes)} ones add up to {sorted(sums)} among {', '.join(nodes)}", "take nodes out until the sum is right")
    return Check(name, f"{len(nodes)} nodes, {1000 * max(seconds for _, seconds in answers.values.values()):.1f} ms")
