"""`deploy/`: images, Kubernetes manifests, Prometheus and Grafana, as far as they can be checked without any of these."""

from __future__ import annotations

import copy
import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import ValidationError

from app.config.loading import load_recipe, with_values
from app.config.recipe import Recipe
from app.planning.cluster_file import cluster_from_file
from app.planning.packing import NodeResources
from app.planning.placement import check_feasible
from app.planning.plan import make_plan
from tests.unit.kuberay_schema import MANIFESTS

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
PYPROJECT = (ROOT / "pyproject.toml").read_text()
KUBERAY = {path.stem: yaml.safe_load(path.read_text()) for path in sorted((DEPLOY / "kuberay").glob("ray*.yaml"))}
CLUSTER_KEYS = {"RayCluster": (), "RayJob": ("rayClusterSpec",), "RayService": ("rayClusterConfig",)}


def cluster_of(document: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = document["spec"]
    for key in CLUSTER_KEYS[document["kind"]]:
        spec = spec[key]
    return spec


def pin(package: str) -> str:
    match = re.search(rf'"{re.escape(package)}(?:\[[\w,]+\])?==([\d.]+)"', PYPROJECT)
    assert match is not None
    return match[1]


def quantity(text: str) -> float:
    number, unit = re.fullmatch(r"([\d.]+)(\w*)", text).groups()  # type: ignore[union-attr]
    return float(number) * {"": 1, "Gi": 2**30, "Ti": 2**40}[unit]


def pods(document: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = cluster_of(document)
    groups = [cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])]
    return [group["template"]["spec"] for group in groups]


def test_there_is_one_manifest_of_each_kind() -> None:
    assert sorted(document["kind"] for document in KUBERAY.values()) == sorted(MANIFESTS)


@pytest.mark.parametrize("name", KUBERAY)
def test_manifests_have_only_fields_of_the_crds(name: str) -> None:
    document = KUBERAY[name]
    MANIFESTS[document["kind"]].validate(document)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "authOption"), {"mode": "token"}),
        (("spec", "authOptions", "mode"), "disabled"),
        (("spec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("spec", "autoscalerOptions", "version"), "v3"),
    ],
)
def test_misspelt_or_wrong_fields_are_refused(path: tuple[str, ...], value: Any) -> None:
    document = copy.deepcopy(KUBERAY["raycluster"])
    table = document
    for part in path[:-1]:
        table = table[part]
    table[path[-1]] = value
    with pytest.raises(ValidationError):
        MANIFESTS["RayCluster"].validate(document)


@pytest.mark.parametrize("name", KUBERAY)
def test_ray_is_the_pinned_one_and_asks_for_its_token(name: str) -> None:
    cluster = cluster_of(KUBERAY[name])
    assert cluster["rayVersion"] == pin("ray")
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-gpus"] == "0"


@pytest.mark.parametrize("name", KUBERAY)
def test_pods_mount_the_shared_volume_and_reserve_what_they_may_use(name: str) -> None:
    claim = yaml.safe_load((DEPLOY / "kuberay" / "shared-volume.yaml").read_text())
    for pod in pods(KUBERAY[name]):
        (container,), (volume,) = pod["containers"], pod["volumes"]
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": "/shared"}]
        assert container["resources"]["requests"] == container["resources"]["limits"]


@pytest.mark.parametrize("name", KUBERAY)
def test_the_images_user_may_write_to_the_shared_volume(name: str) -> None:
    user = re.search(r"useradd \S+ --uid (\d+) corral", (DEPLOY / "Containerfile").read_text())
    assert user is not None
    for pod in pods(KUBERAY[name]):  # a fresh volume belongs to root; looking through all its files at every start would take hours
        assert pod["securityContext"] == {"fsGroup": int(user[1]), "fsGroupChangePolicy": "OnRootMismatch"}


def job_recipe() -> Recipe:
    words = shlex.split(KUBERAY["rayjob"]["spec"]["entrypoint"])
    assert words[:4] == ["python", "-m", "jobs", "ppo"]
    return load_recipe(words[4].replace("/opt/corral", str(ROOT)), words[5:])


def test_a_stopped_job_has_the_time_that_corral_submit_would_give_it() -> None:
    recipe = job_recipe()
    variables = yaml.safe_load(KUBERAY["rayjob"]["spec"]["runtimeEnvYAML"])["env_vars"]
    assert variables == {"RAY_JOB_STOP_WAIT_TIME_S": str(int(recipe.run.deadline_seconds))}
    (stage,) = make_plan(recipe, "ppo", cluster_from_file(ROOT / "cluster.yaml")).stages
    assert stage.timing is not None and stage.timing.seconds_per_step is not None
    assert float(variables["RAY_JOB_STOP_WAIT_TIME_S"]) > 2 * stage.timing.seconds_per_step  # it ends its step first


def test_the_jobs_command_can_run_on_its_pods() -> None:
    recipe = job_recipe()
    assert recipe.run.dir.startswith("/shared/") and recipe.model.path.startswith("/shared/")
    workers = pods(KUBERAY["rayjob"])[1:]
    offers = [pod["containers"][0]["resources"]["limits"] for pod in workers]
    nodes = tuple(NodeResources(quantity(offer["cpu"]), int(offer["nvidia.com/gpu"])) for offer in offers)
    have = {"CPU": sum(node.cpus for node in nodes), "GPU": float(sum(node.gpus for node in nodes))}
    check_feasible(recipe, "ppo", have | {"memory": sum(quantity(offer["memory"]) for offer in offers)}, nodes)


def test_the_services_models_fit_its_pod() -> None:
    document = yaml.safe_load(KUBERAY["rayservice"]["spec"]["serveConfigV2"])
    recipe = with_values(Recipe(), document["applications"][0]["args"])
    served = recipe.serving.models
    assert {name: model.kind for name, model in served.items()} == {"reward": "reward", "reference": "reference"}
    limits = pods(KUBERAY["rayservice"])[1]["containers"][0]["resources"]["limits"]
    assert sum(model.workers.gpus for model in served.values()) == float(limits["nvidia.com/gpu"])


def test_clients_of_the_service_need_a_token_too() -> None:
    for pod in pods(KUBERAY["rayservice"]):
        variables = {variable["name"]: variable for variable in pod["containers"][0]["env"]}
        assert "secretKeyRef" in variables["CORRAL_SERVE_TOKEN"]["valueFrom"]


@pytest.mark.parametrize("name", ["Containerfile", "corral.def"])
def test_images_install_the_gpu_lock_and_all_packages(name: str) -> None:
    text = (DEPLOY / name).read_text()
    assert f"torch=={pin('torch')}" in text
    assert re.search(r"--no-deps -r \S*requirements/cuda.txt", text)
    assert "RAY_AUTH_MODE=token" in text
    copied = re.findall(r"^COPY (.+) \./\S*$|^ {4}(\w[\w.]*) /opt/corral/\S+$", text, re.MULTILINE)
    sources = {source for first, second in copied for source in (first or second).split()}
    assert {"app", "serve", "jobs", "requirements", "pyproject.toml"} <= sources
    assert all((ROOT / source).exists() for source in sources)


def test_the_build_context_holds_what_is_copied_and_nothing_else() -> None:
    lines = (DEPLOY / "Containerfile.dockerignore").read_text().splitlines()
    kept = {line[1:] for line in lines if line.startswith("!")}
    copied = {
        source
        for line in re.findall(r"^COPY (.+) \./\S*$", (DEPLOY / "Containerfile").read_text(), re.MULTILINE)
        for source in line.split()
    }
    assert lines[0] == "*" and kept == copied


def test_an_apptainer_image_takes_no_packages_from_the_users_home() -> None:
    environment = (DEPLOY / "corral.def").read_text().partition("%environment")[2].partition("\n%")[0]
    assert "PYTHONNOUSERSITE=1" in environment  # Apptainer mounts it, and ~/.local comes before the image's own


def test_no_process_of_an_apptainer_cluster_outlives_its_command() -> None:
    """Apptainer takes an image that is mounted without root away when the command that it was started for ends."""
    starts = re.findall(r"apptainer exec .* ray start .*", (DEPLOY / "corral.def").read_text())
    assert len(starts) == 2 and all("--block" in start for start in starts)


@pytest.mark.parametrize("name", ["cluster.yaml", "deploy/kuberay/raycluster.yaml"])
def test_the_jobs_that_a_cluster_is_shown_with_find_what_they_read_on_its_nodes(name: str) -> None:
    """Recipes name models by where the stages before leave them here, which no node has."""
    lines = re.findall(r"^# +corral submit ((?:.*\\\n# +)*.*)$", (ROOT / name).read_text(), re.MULTILINE)
    jobs = [shlex.split(re.sub(r"\\\n# +", "", line)) for line in lines]
    left = set()
    for command, path, *words in jobs:
        recipe = load_recipe(ROOT / path, [word for word in words if "." in word.partition("=")[0]])
        assert recipe.run.dir.startswith("/shared/")
        needed = [each for each in (recipe.model.path, recipe.reward.path) if each is not None and (each.count("/") > 1 or each in left)]
        assert set(needed) <= left, f"{command} {path}"
        left.add(f"{recipe.run.dir}/{command}/model")
    assert [job[0] for job in jobs] == ["sft", "rm", "ppo"]


def test_prometheus_reads_the_file_that_ray_writes() -> None:
    constants = importlib.import_module("ray._private.ray_constants")
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    assert job["file_sd_configs"] == [{"files": [f"/tmp/ray/{constants.PROMETHEUS_SERVICE_DISCOVERY_FILE}"]}]
    monitor = yaml.safe_load((DEPLOY / "prometheus" / "podmonitor.yaml").read_text())
    assert "release" in monitor["metadata"]["labels"]  # without it kube-prometheus-stack passes it over
    port = monitor["spec"]["podMetricsEndpoints"][0]["port"]
    assert all(port in {entry["name"] for entry in pods(document)[0]["containers"][0]["ports"]} for document in KUBERAY.values())


def test_grafana_is_given_prometheus_and_folders_of_dashboards() -> None:
    folder = DEPLOY / "grafana" / "provisioning"
    (source,) = yaml.safe_load((folder / "datasources" / "prometheus.yaml").read_text())["datasources"]
    assert (source["type"], source["isDefault"]) == ("prometheus", True)
    providers = yaml.safe_load((folder / "dashboards" / "dashboards.yaml").read_text())["providers"]
    assert {provider["name"]: provider["type"] for provider in providers} == {"corral": "file", "ray": "file"}
