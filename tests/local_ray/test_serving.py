"""The service as its operator sees it on a real Ray Serve: updates, faults of the doors, scaling, neighbours, GPUs, an end without loss."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import ray
import torch
import yaml
from click.testing import CliRunner
from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.serve.scripts import cli as serve_command
from ray.util.state import list_actors

from app.config.loading import load_recipe
from app.config.serving import BatchingConfig, ServedModelConfig, ServingConfig
from app.config.shared import WorkersConfig
from app.errors import ConfigError
from app.models.forward import pad_sequences, sequence_logprobs
from app.models.load import load_causal_lm
from app.workers.processes import process_options
from app.workers.rollout import engine_options
from jobs.main import main
from jobs.serving import APPLICATION, Service, close
from jobs.serving_inputs import opened_doors
from serve import deploying
from serve.deploying import NO_DOORS, Deployed, ServeGoneError, deploy, deployed, http_door, target
from serve.scoring import model_options, scoring_application
from tests.local_ray.service_load import DEADLINE, IDS, Ask, by_grpc, by_handle, by_http, check_answers, load, wait_for
from tests.tiny_models import make_neox

DASHBOARD = Path(__file__).resolve().parents[2] / "deploy" / "grafana" / "scoring.json"


@dataclass(frozen=True)
class Policies:
    """Two versions of a model, and the log-probs that each gives."""

    paths: Mapping[str, str]
    logprobs: Mapping[str, np.ndarray]


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Policies:
    root = tmp_path_factory.mktemp("policies")
    paths = {version: make_neox(root / version, seed=int(version)) for version in ("1", "2")}
    with torch.no_grad():
        logprobs = {version: sequence_logprobs(load_causal_lm(path), *pad_sequences([IDS]))[0].numpy() for version, path in paths.items()}
    assert np.abs(logprobs["1"] - logprobs["2"]).max() > 0.01
    return Policies(paths, logprobs)


def policy(policies: Policies, version: str, cpus: float = 0.1, **more: Any) -> ServedModelConfig:
    return ServedModelConfig(path=policies.paths[version], version=version, workers=WorkersConfig(cpus=cpus), **more)


@dataclass(frozen=True)
class Running:
    """A service with one model, `policy`, behind both doors."""

    doors: ServingConfig
    applications: Deployed

    @property
    def handle(self) -> DeploymentHandle[Any]:
        return serve.get_deployment_handle("policy", APPLICATION)

    @property
    def ways_in(self) -> tuple[Ask, Ask, Ask]:
        return by_handle(self.handle), by_http(self.doors.http_port), by_grpc(self.doors.grpc_port)

    def service(self, **models: ServedModelConfig) -> Service:
        return Service(load_recipe(None), models, self.doors, None)

    def update(self, *others: serve.RunTarget, **models: ServedModelConfig) -> None:
        self.applications.update([*self.service(**models).targets(), *others], DEADLINE)

    def process(self) -> int:
        return int(self.handle.stats.remote().result()["pid"])


@pytest.fixture(scope="module")
def running(policies: Policies, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    log = tmp_path_factory.mktemp("logs") / "access.jsonl"
    doors = opened_doors(ServingConfig(http_port=0, grpc_port=0, access_log=str(log)))
    targets = Service(load_recipe(None), {"policy": policy(policies, "1")}, doors, None).targets()
    with deployed(targets, deadline_seconds=DEADLINE, stop_serve=True, start=http_door(doors.host, doors.http_port)) as applications:
        yield Running(doors, applications)


@pytest.fixture
def service(running: Running, policies: Policies) -> Running:
    """At version 1 again."""
    running.update(policy=policy(policies, "1"))
    return running


def test_a_new_version_is_swapped_in_place_under_load(service: Running, policies: Policies) -> None:
    process = service.process()
    with load(*service.ways_in) as under:
        service.update(policy=policy(policies, "2"))
        assert by_handle(service.handle)().version == "2"
    assert not under.failures
    check_answers(under.answers, policies.logprobs)
    assert {answer.version for answer in under.answers} == {"1", "2"}
    assert under.answers[-1].version == "2"
    assert service.process() == process, "the replica was replaced"


def test_a_version_that_cannot_be_loaded_leaves_the_old_one(service: Running, policies: Policies, tmp_path: Path) -> None:
    broken = make_neox(tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"no weights")
    process = service.process()
    service.update(policy=policy(policies, "1").model_copy(update={"path": broken, "version": "3"}))
    answers = [ask() for ask in service.ways_in]
    assert {answer.version for answer in answers} == {"1"}
    check_answers(answers, policies.logprobs)
    assert broken in service.handle.describe.remote().result().refused
    assert service.process() == process


def test_models_and_other_applications_come_and_go(service: Running, policies: Policies) -> None:
    class Greeting:
        def __call__(self, request: Any) -> str:
            return "hello"

    process = service.process()
    with load(*service.ways_in) as under:
        greeting = serve.deployment(Greeting).options(ray_actor_options={"num_cpus": 0.1}).bind()
        service.update(target(greeting, "neighbour", "/hello"), policy=policy(policies, "1"), other=policy(policies, "2"))
        assert httpx.get(f"http://127.0.0.1:{service.doors.http_port}/hello").text == "hello"
        check_answers([by_grpc(service.doors.grpc_port, "other")(), by_http(service.doors.http_port, "other")()], policies.logprobs)
        service.update(policy=policy(policies, "1"))
        assert set(serve.status().applications) == {APPLICATION}
    assert not under.failures
    check_answers(under.answers, policies.logprobs)
    assert service.process() == process


@pytest.mark.parametrize("victim", ["ProxyActor", "ServeReplica:scoring:doors", "ServeController"])
def test_a_killed_door_or_controller_comes_back(service: Running, policies: Policies, victim: str) -> None:
    """Raw callers at a killed door may see their connection break; nobody gets a wrong answer, and handles are not disturbed."""

    def process() -> int | None:
        living = list_actors(filters=[("state", "=", "ALIVE"), ("class_name", "=", victim)])
        return living[0].pid if living else None

    killed = process()
    assert killed is not None
    ways_in = service.ways_in
    with load(*ways_in) as under, load(by_handle(service.handle)) as inside:
        os.kill(killed, signal.SIGKILL)
        wait_for(lambda: process() not in (None, killed))
        if victim != "ServeController":
            wait_for(lambda: bool(under.failures) or not psutil.pid_exists(killed))
    assert not inside.failures
    if victim == "ServeController":
        assert not under.failures
    check_answers([*under.answers, *inside.answers, *(ask() for ask in ways_in)], policies.logprobs)


def test_what_the_dashboard_asks_for_is_exported(running: Running) -> None:
    asked = set(re.findall(r"ray_corral_\w+", DASHBOARD.read_text()))
    silent = {"ray_corral_scoring_padding_tokens_total", "ray_corral_scoring_cached_sequences_total"}  # nothing was padded, no cache is on
    node = ray.nodes()[0]
    metrics = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    wait_for(lambda: asked - silent <= set(re.findall(r"^(\w+){", httpx.get(metrics).text, re.MULTILINE)))


def test_other_changes_replace_replicas_under_load_and_stopping_answers_what_is_in_flight(running: Running, policies: Policies) -> None:
    """From now on each request waits half a second for its batch; the service is then stopped with requests in flight."""
    slow = policy(policies, "2", batching=BatchingConfig(wait_seconds=0.5))
    process = running.process()
    with load(*running.ways_in) as under:
        running.update(policy=slow)
        wait_for(lambda: under.answers[-1].version == "2")
    assert not under.failures
    check_answers(under.answers, policies.logprobs)
    assert running.process() != process
    asked, before = 6, requests(running)
    with ThreadPoolExecutor(asked) as pool:
        pending = [pool.submit(ask) for ask in running.ways_in[1:] * (asked // 2)]
        close(running.service(policy=slow))
        check_answers([future.result() for future in pending], policies.logprobs)
    assert requests(running) - before == asked
    with pytest.raises(httpx.HTTPStatusError):
        by_http(running.doors.http_port)()


def requests(running: Running) -> int:
    return int(running.handle.stats.remote().result().get("requests", 0))


def test_replicas_follow_the_load(running: Running, policies: Policies) -> None:
    """Every request waits half a second for its batch, as it would for a slow model."""
    batching = BatchingConfig(wait_seconds=0.5)
    config = policy(
        policies, "1", max_replicas=2, target_ongoing_requests=2, upscale_delay_seconds=0, downscale_delay_seconds=1, batching=batching
    )

    def replicas() -> int:
        return serve.status().applications["scaled"].deployments["policy"].replica_states.get("RUNNING", 0)

    with deployed([target(scoring_application({"policy": config}), "scaled")], deadline_seconds=DEADLINE, stop_serve=True):
        assert replicas() == 1
        with load(*[by_handle(serve.get_deployment_handle("policy", "scaled"))] * 8) as under:
            wait_for(lambda: replicas() == 2)
        assert not under.failures
        wait_for(lambda: replicas() == 1)


def test_scorers_share_no_gpu_with_learners_and_engines(running: Running, policies: Policies) -> None:
    """Logical GPUs: processes that are started as the real ones are, with the real ones' options, but load nothing on a GPU."""

    class Probe:
        def gpus(self) -> list[str]:
            return ray.get_runtime_context().get_accelerator_ids()["GPU"]

        def reconfigure(self, settings: object) -> None:
            """Takes a model's user config."""

    def scorer(name: str, gpus: float) -> serve.Application:
        config = ServedModelConfig(path=policies.paths["1"], workers=WorkersConfig(cpus=0.1, gpus=gpus))
        return serve.deployment(name=name, **model_options(config))(Probe).bind()

    learner = ray.remote(Probe).options(**process_options(WorkersConfig(cpus=0.1, gpus=1))).remote()
    engine = ray.remote(Probe).options(**engine_options(WorkersConfig(cpus=0.1, gpus=1), "DEFAULT")).remote()
    targets = [target(scorer(name, gpus), name) for name, gpus in (("reward", 1), ("reference", 0.5))]
    with deployed(targets, deadline_seconds=DEADLINE, stop_serve=True):
        given = ray.get([learner.gpus.remote(), engine.gpus.remote()])
        given += [serve.get_deployment_handle(each.name, each.name).gpus.remote().result() for each in targets]
    for actor in (learner, engine):
        ray.kill(actor)
    assert [len(ids) for ids in given] == [1, 1, 1, 1]
    assert len({ids[0] for ids in given}) == 4, "nobody shares; a fraction never comes off a GPU that somebody has whole"


def test_a_serve_that_its_starter_stops_is_started_again(policies: Policies, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job that had started Serve ends between this job's look for it and its deployment."""
    serve.shutdown()
    targets = [target(scoring_application({"policy": policy(policies, "1")}), "late")]
    with pytest.raises(ServeGoneError):
        deploy(targets, DEADLINE)
    deploying.start_serve(NO_DOORS)
    doors = http_door("127.0.0.1", 8000)
    with pytest.raises(ConfigError, match="no HTTP port"), deployed(targets, deadline_seconds=DEADLINE, stop_serve=True, start=doors):
        pass
    genuine, calls = deploying.deploy, []

    def after_the_starter_has_gone(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 1:
            serve.shutdown()
        genuine(*arguments)

    monkeypatch.setattr(deploying, "deploy", after_the_starter_has_gone)
    with deployed(targets, deadline_seconds=DEADLINE, stop_serve=True):
        assert len(calls) == 2
        assert by_handle(serve.get_deployment_handle("policy", "late"))().version == "1"
    assert not deploying.serve_is_running(), "who started Serve in the end also stops it"


def test_a_config_file_is_deployed_and_its_user_config_swaps_in_place(policies: Policies, tmp_path: Path) -> None:
    """`corral serve build`, then Ray's `serve deploy` of the file and of an edited one."""
    file = tmp_path / "service.yaml"
    options = ["--model", f"policy={policies.paths['1']}", "--serving.models.policy.workers.cpus=0.1", "--http-port=0", "--grpc-port=0"]
    assert main(["serve", "build", *options, "-o", str(file)]) == 0
    document = yaml.safe_load(file.read_text())
    door = document["http_options"]
    assert door["host"] == "127.0.0.1"
    deploying.start_serve(deploying.http_door(**door))  # else the dashboard's process does, which does not find this working copy
    try:
        grpc_port = document["applications"][0]["args"]["serving.grpc_port"]
        ways_in = (by_http(door["port"]), by_grpc(grpc_port))

        def deployed_version(version: str) -> int:
            command = ["deploy", str(file), "--address", f"http://{ray._private.worker.get_dashboard_url()}"]
            result = CliRunner().invoke(serve_command, command)
            assert result.exit_code == 0, result.output
            wait_for(lambda: APPLICATION in serve.status().applications and serve.status().applications[APPLICATION].status == "RUNNING")
            answers = [ask() for ask in ways_in]
            assert {answer.version for answer in answers} == {version}
            check_answers(answers, policies.logprobs)
            return int(serve.get_deployment_handle("policy", APPLICATION).stats.remote().result()["pid"])

        process = deployed_version("1")
        document["applications"][0]["deployments"][0]["user_config"] = {"path": policies.paths["2"], "version": "2"}
        file.write_text(yaml.safe_dump(document))
        assert deployed_version("2") == process, "the replica was replaced"
    finally:
        serve.shutdown()
