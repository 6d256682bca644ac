"""Verdicts over facts: pure functions from reports to checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jobs.diagnosis.check import Check
from jobs.diagnosis.node_report import NCCL_PACKAGES, NodeReport, Space

PYTHONS = ("3.11", "3.12")
GIB = 2**30
MIN_SHARED_MEMORY = GIB // 2
MIN_DISK = 5 * GIB
MIN_TASKS = 2048  # processes and threads: Ray, vLLM and torch start hundreds each
MAX_CLOCK_SECONDS = 1.0
BREAKS_TRANSFORMERS = ("torchvision", "torchaudio", "torchcodec")
SHOWN = 5


@dataclass(frozen=True)
class Locks:
    """The pinned versions, by normalised name, of machines without and with CUDA builds; empty where there is no lock to compare with."""

    cpu: Mapping[str, str]
    cuda: Mapping[str, str]

    def of(self, packages: Mapping[str, str]) -> tuple[str, Mapping[str, str]]:
        """(file, versions) of the lock that belongs to the installed vLLM."""
        return ("cuda.txt", self.cuda) if "vllm" in packages else ("cpu.txt", self.cpu)


@dataclass(frozen=True)
class Clock:
    """seconds: by how much a node's clock is ahead of this machine's; error: what the asking took at most, in each direction."""

    seconds: float
    error: float


@dataclass(frozen=True)
class Link:
    """Whether node `source` could open a connection to node `target`; error: why not."""

    source: str
    target: str
    error: str | None = None


def judge_node(report: NodeReport, locks: Locks, node: str | None = None) -> list[Check]:
    """Everything that can be said of one machine by itself."""
    checks = [
        _python(report),
        _cores(report),
        _tasks(report),
        _shared_memory(report.shared_memory),
        *(_disk(purpose, space) for purpose, space in report.disks.items()),
        _versions(report, locks),
        _unwanted(report),
        _gpus(report),
    ]
    return [Check(check.name, check.finding, check.remedy, node) for check in checks]


def judge_nodes(reports: Mapping[str, NodeReport]) -> list[Check]:
    """What has to be alike, or to fit together, on all nodes. reports: by the node's name."""
    several = len({(report.host, report.address) for report in reports.values()}) > 1
    checks = [_address(node, report, several=several) for node, report in reports.items()]
    checks.append(
        _alike("Python on all nodes", {node: report.python for node, report in reports.items()}, "install the same Python everywhere")
    )
    nccl = {node: report.nccl for node, report in reports.items() if report.nccl is not None}
    if nccl:
        checks.append(_alike("NCCL on all nodes", nccl, f"install one version of {NCCL_PACKAGES}-* everywhere"))
    return checks


def judge_clocks(clocks: Mapping[str, Clock]) -> list[Check]:
    """Beyond a second the order of log lines, metrics and checkpoints of several nodes is lost."""
    checks = []
    for node, clock in clocks.items():
        behind = "ahead" if clock.seconds > 0 else "behind"
        finding = f"{abs(clock.seconds):.3f} s {behind} of this machine's, give or take {clock.error:.3f} s"
        wrong = abs(clock.seconds) - clock.error > MAX_CLOCK_SECONDS
        checks.append(Check("clock", finding, "synchronise it (chrony, ntpd, timesyncd)" if wrong else None, node))
    return checks


def judge_links(links: Sequence[Link]) -> list[Check]:
    """One line for all that work, one for each that does not."""
    broken = [link for link in links if link.error is not None]
    remedy = "open all ports between the nodes, and start Ray with --node-ip-address = one that the others can reach"
    checks = [Check(f"connection to {link.target}", str(link.error), remedy, link.source) for link in broken]
    return [*checks, Check("connections between nodes", f"{len(links) - len(broken)} of {len(links)} work")] if links else []


def _python(report: NodeReport) -> Check:
    fits = report.python.rpartition(".")[0] in PYTHONS
    return Check("python", report.python, None if fits else f"use Python {' or '.join(PYTHONS)}")


def _cores(report: NodeReport) -> Check:
    return Check("cores", f"{report.cores}, OMP_NUM_THREADS {report.threads or 'not set'}")


def _tasks(report: NodeReport) -> Check:
    if report.task_limit is None:
        return Check("threads", "no limit")
    short = report.task_limit < MIN_TASKS
    remedy = f"allow {MIN_TASKS} (`ulimit -u`, or the container's pids limit)" if short else None
    return Check("threads", f"at most {report.task_limit} processes and threads", remedy)


def _shared_memory(space: Space | None) -> Check:
    remedy = "enlarge /dev/shm (docker run --shm-size=2g)"
    return _space("shared memory", space, MIN_SHARED_MEMORY, remedy) if space else Check("shared memory", "no /dev/shm", remedy)


def _disk(purpose: str, space: Space) -> Check:
    return _space(f"disk of {purpose}", space, MIN_DISK, "free some space")


def _space(name: str, space: Space, least: int, remedy: str) -> Check:
    finding = f"{space.free / GIB:.1f} of {space.size / GIB:.1f} GiB free in {space.path}"
    return Check(name, finding, None if space.free >= least else f"{remedy}; {least / GIB:g} GiB are needed")


def _versions(report: NodeReport, locks: Locks) -> Check:
    """Every package of the lock that belongs to the machine."""
    file, wanted = locks.of(report.packages)
    if not wanted:
        return Check("versions", "no requirements/ beside the package; not compared")
    wrong = [
        f"{name} {report.packages.get(name, 'missing')} (lock: {version})"
        for name, version in wanted.items()
        if report.packages.get(name) != version
    ]
    remedy = f"pip install --no-deps -r requirements/{file}" if wrong else None
    return Check("versions", _shortened(wrong) or f"{len(wanted)} packages as in requirements/{file}", remedy)


def _unwanted(report: NodeReport) -> Check:
    """Packages whose builds do not match torch's and then break the import of transformers."""
    found = [name for name in BREAKS_TRANSFORMERS if name in report.packages]
    remedy = f"pip uninstall {' '.join(found)}" if found else None
    return Check("packages that break transformers", ", ".join(found) or "none", remedy)


def _gpus(report: NodeReport) -> Check:
    there = _shortened([f"{gpu.name} ({gpu.memory / GIB:.0f} GiB, driver {gpu.driver})" for gpu in report.gpus]) or "none"
    nccl = f", NCCL {report.nccl}" if report.nccl else ""
    if report.counted_gpus > len(report.gpus):
        remedy = f"start its Ray with --num-gpus={len(report.gpus)}"
        return Check("GPUs", f"{there}{nccl}, and Ray counts {report.counted_gpus:g}", remedy)
    without_cuda = report.gpus and report.nccl is None
    return Check("GPUs", f"{there}{nccl}", "install requirements/cuda.txt: this torch cannot use them" if without_cuda else None)


def _address(node: str, report: NodeReport, *, several: bool) -> Check:
    own = {address: name for name, addresses in report.interfaces.items() for address in addresses}
    others = ", ".join(f"{name} {address}" for address, name in own.items() if address != report.address and name != "lo")
    remedy = "start its Ray with --node-ip-address = an address of it that the other nodes can reach"
    if report.address not in own:
        return Check("address", f"{report.address} is on none of its interfaces ({others or 'none'})", remedy, node)
    if several and own[report.address] == "lo":
        return Check("address", f"{report.address} is its loopback, which no other node reaches", remedy, node)
    return Check("address", f"{report.address} on {own[report.address]}{f'; also {others}' if others else ''}", None, node)


def _alike(name: str, found: Mapping[str, str], remedy: str) -> Check:
    versions: dict[str, list[str]] = {}
    for node, version in found.items():
        versions.setdefault(version, []).append(node)
    if len(versions) == 1:
        return Check(name, next(iter(versions)))
    commonest_first = sorted(versions.items(), key=lambda item: -len(item[1]))
    return Check(name, "; ".join(f"{version} on {_shortened(nodes)}" for version, nodes in commonest_first), remedy)


def _shortened(items: Sequence[str]) -> str:
    return ", ".join(items[:SHOWN]) + (f" and {len(items) - SHOWN} more" if len(items) > SHOWN else "")
