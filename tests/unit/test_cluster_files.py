"""`cluster.yaml` and its variants in `deploy/` under Ray's own loader, without a cloud."""

from __future__ import annotations

import os
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.config.loading import load_recipe
from app.errors import ConfigError
from app.planning.cluster_file import cluster_from_file
from app.planning.hardware import MACHINES
from app.planning.memory import GIB
from app.planning.placement import check_feasible
from app.planning.plan import make_plan

ROOT = Path(__file__).resolve().parents[2]
PYTHIA = sorted((ROOT / "jobs" / "recipes" / "pythia").glob("[!b]*.toml"))
CLOUDS = ("cluster.yaml", "deploy/gcp.yaml")
LOCK = (ROOT / "requirements" / "cuda.txt").read_text()
DRIVER = 580  # the oldest NVIDIA driver for CUDA 13: https://docs.nvidia.com/cuda/cuda-toolkit-release-notes/
ALL = (*CLOUDS, "deploy/on_premise.yaml")
COMMANDS = (
    "initialization_commands",
    "head_setup_commands",  # with setup_commands, which Ray puts before both
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)


@cache
def loaded(name: str) -> dict[str, Any]:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config: dict[str, Any] = prepare_config(yaml.safe_load((ROOT / name).read_text()))
    validate_config(config)
    return config


@pytest.mark.parametrize("name", CLOUDS)
def test_a_cpu_head_and_workers_with_eight_gpus(name: str) -> None:
    cluster = loaded(name)
    gpus = {kind: node["resources"].get("GPU", 0) for kind, node in cluster["available_node_types"].items()}
    assert gpus.pop(cluster["head_node_type"]) == 0
    assert set(gpus.values()) == {8}


@pytest.mark.parametrize("name", CLOUDS)
def test_resources_are_those_of_the_machines(name: str) -> None:
    for node in loaded(name)["available_node_types"].values():
        machine = MACHINES[node["node_config"].get("InstanceType") or node["node_config"]["machineType"]]
        assert node["resources"].get("CPU") == machine.cpus
        assert node["resources"].get("GPU", 0) == machine.gpus


@pytest.mark.parametrize("name", CLOUDS)
@pytest.mark.parametrize("recipe", PYTHIA, ids=lambda path: path.stem)
def test_the_pythia_recipes_fit(name: str, recipe: Path) -> None:
    command = recipe.stem.split("-")[0]
    types = loaded(name)["available_node_types"].values()
    have = {kind: float(sum(node["resources"].get(kind, 0) * node.get("min_workers", 1) for node in types)) for kind in ("CPU", "GPU")}
    check_feasible(load_recipe(recipe), command, have | {"memory": 1100.0 * GIB})
    plan = make_plan(load_recipe(recipe), command, cluster_from_file(ROOT / name))
    assert plan.fits and len(plan.cluster.nodes) == 2  # the head and the one worker that stays up


@pytest.mark.parametrize("name", CLOUDS)
def test_spot_machines_are_for_those_that_ask_for_them(name: str) -> None:
    types = loaded(name)["available_node_types"]
    spot = types["rollout_spot"]
    assert (spot["min_workers"], spot["max_workers"], spot["labels"]) == (0, 0, {"market-type": "spot"})
    assert types["a100x8"]["labels"] == {"market-type": "on-demand"}
    config = spot["node_config"]
    assert config.get("InstanceMarketOptions", {}).get("MarketType") == "spot" or config["scheduling"][0]["provisioningModel"] == "SPOT"


def test_engines_on_spot_and_learners_on_demand(tmp_path: Path) -> None:
    text = (ROOT / "cluster.yaml").read_text()
    raised = text.replace("    min_workers: 0\n    max_workers: 0\n", "    min_workers: 1\n    max_workers: 1\n")
    (tmp_path / "cluster.yaml").write_text(raised)
    labels = ["--ppo.workers.labels.market-type=on-demand", "--rollout.engines.labels.market-type=spot", "--rollout.colocate=false"]
    recipe = load_recipe(ROOT / "jobs" / "recipes" / "pythia" / "ppo-12b.toml", labels)
    (stage,) = make_plan(recipe, "ppo", cluster_from_file(tmp_path / "cluster.yaml")).stages
    nodes = {role: {slot.node for slot in stage.slots if slot.role == role} for role in ("learner", "engine")}
    assert stage.fits and len(nodes["learner"]) == len(nodes["engine"]) == 1 and nodes["learner"] != nodes["engine"]
    (shortage,) = make_plan(recipe, "ppo", cluster_from_file(ROOT / "cluster.yaml")).stages[0].shortages
    assert "engine 1 of 6 needs a node with market-type=spot" in shortage


@pytest.mark.parametrize("name", ALL)
def test_nodes_authenticate_and_install_the_gpu_lock(name: str) -> None:
    cluster = loaded(name)
    for command in (cluster["head_start_ray_commands"][-1], cluster["worker_start_ray_commands"][-1]):
        assert "RAY_AUTH_MODE=token" in command
        assert command.startswith("ulimit -n 65536; ")  # as in Ray's own files: Ubuntu's 1024 are soon used up
    assert "~/.ray/auth_token" in cluster["file_mounts"].values()
    pin = re.search(r'"(torch==[\d.]+)"', (ROOT / "pyproject.toml").read_text())
    setup = "\n".join(cluster["setup_commands"])
    assert pin is not None
    assert pin[1] in setup
    assert "requirements/cuda.txt" in setup


@pytest.mark.parametrize("name", ALL)
def test_every_command_is_whole(name: str) -> None:
    cluster = loaded(name)
    commands = [(key, command) for key in COMMANDS for command in cluster[key]]
    assert {"head_setup_commands", "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands"} <= {
        key for key, _ in commands
    }
    for key, command in commands:
        checked = subprocess.run(["bash", "-n", "-c", f"({command})"], capture_output=True, text=True, check=False)  # as Ray wraps it
        assert (checked.returncode, checked.stderr) == (0, ""), f"{key}: {command}"


@pytest.mark.parametrize("name", ALL)
def test_a_nodes_shell_finds_ray_and_its_token_mode(name: str, tmp_path: Path) -> None:
    (command,) = [command for command in loaded(name)["setup_commands"] if ".bashrc" in command]
    home = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    for _ in range(2):  # `ray up` runs the commands again on nodes that are up
        subprocess.run(["bash", "-c", command], env=home, check=True)
    assert len((tmp_path / ".bashrc").read_text().splitlines()) == 1
    shown = subprocess.run(
        ["bash", "-c", "source ~/.bashrc; echo $PATH $RAY_AUTH_MODE"], env=home, capture_output=True, text=True, check=True
    )
    assert shown.stdout == f"{tmp_path}/venv/bin:{os.environ['PATH']} token\n"


def image(node: dict[str, Any]) -> str:
    config = node["node_config"]
    found: str = config["ImageId"] if "InstanceType" in config else config["disks"][0]["initializeParams"]["sourceImage"]
    return found


@pytest.mark.parametrize("name", CLOUDS)
def test_no_machine_is_left_with_an_image_of_rays_choice(name: str) -> None:
    """Ray's is Ubuntu 18.04, whose C library is older than what torch's wheels need."""
    for kind, node in loaded(name)["available_node_types"].items():
        assert re.fullmatch(r"(resolve:ssm:/aws/service|projects)/\S+ubuntu\S+22\.?04\S*", image(node)), kind


@pytest.mark.parametrize("name", CLOUDS)
def test_images_of_gpu_machines_have_a_driver_for_the_locks_cuda(name: str) -> None:
    assert re.search(r"^cuda-toolkit==13\.", LOCK, re.MULTILINE)
    cluster = loaded(name)
    for kind, node in cluster["available_node_types"].items():
        driver = re.search(r"nvidia-(driver|\d+)", image(node))  # AWS names no number: the newest image, whose driver is 580 or later
        if kind == cluster["head_node_type"]:
            assert driver is None
        else:
            assert driver is not None
            assert driver[1] == "driver" or int(driver[1]) >= DRIVER


@pytest.mark.parametrize("name", CLOUDS)
def test_python_comes_from_the_locks_uv(name: str) -> None:
    """Ubuntu 22.04's own python3.11 is a release candidate, and installed without the headers that Triton compiles against."""
    pin = re.search(r"^uv==([\d.]+)$", LOCK, re.MULTILINE)
    setup = "\n".join(loaded(name)["setup_commands"])
    assert pin is not None
    assert f"https://astral.sh/uv/{pin[1]}/install.sh" in setup
    assert "uv venv --managed-python --seed" in setup  # seed: with pip
    assert "apt-get install -y python3" not in setup
    assert "install -y gcc" in loaded(name)["worker_setup_commands"][-1]


@pytest.mark.parametrize(("name", "package"), [("cluster.yaml", "boto3"), ("deploy/gcp.yaml", "google-api-python-client")])
def test_the_head_can_start_workers(name: str, package: str) -> None:
    """Its autoscaler needs the provider's client, which the lock has not; without a command of ours Ray installs one of its own choice."""
    assert not re.search(rf"^{package}==", LOCK, re.MULTILINE)
    cluster = loaded(name)
    assert cluster["head_setup_commands"][len(cluster["setup_commands"]) :] == [
        f"~/venv/bin/pip install --quiet --constraint ~/corral/requirements/cuda.txt {package}"
    ]
    assert f"pip install {package}" in (ROOT / name).read_text().partition("\ncluster_name:")[0]  # and the machine of `ray up` too


def test_machines_of_ones_own_are_all_kept() -> None:
    (node,) = loaded("deploy/on_premise.yaml")["available_node_types"].values()
    assert node["min_workers"] == node["max_workers"] == 2
    with pytest.raises(ConfigError, match="2x8xA100-80GB"):
        cluster_from_file(ROOT / "deploy" / "on_premise.yaml")
