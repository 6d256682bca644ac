"""The service as its operator sees it on a real Ray Serve: updates, faults of the doors, neighbours, an end without loss."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import ray
from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.util.state import list_actors

from app.config.loading import load_recipe
from app.config.serving import BatchingConfig, ServedModelConfig, ServingConfig
from jobs.serving import APPLICATION, Service, close
from jobs.serving_inputs import opened_doors
from serve.deploying import Deployed, deployed, http_door, target
from tests.local_ray.service_load import DEADLINE, Ask, Policies, by_grpc, by_handle, by_http, check_answers, load
from tests.tiny_models import make_neox
from tests.waiting import wait_until

DASHBOARD = Path(__file__).resolve().parents[2] / "deploy" / "grafana" / "scoring.json"


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Policies:
    return Policies.make(tmp_path_factory.mktemp("policies"))


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

    def models(self) -> list[dict[str, str]]:
        """As the HTTP door lists them."""
        index: list[dict[str, str]] = httpx.post(f"http://127.0.0.1:{self.doors.http_port}/v2/repository/index", timeout=DEADLINE).json()
        return index

    def process(self) -> int:
        return int(self.handle.stats.remote().result()["pid"])


def process_of(actor: str) -> int | None:
    """The process of the living actor of that class."""
    living = list_actors(filters=[("state", "=", "ALIVE"), ("class_name", "=", actor)])
    return living[0].pid if living else None


@pytest.fixture(scope="module")
def running(policies: Policies, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    log = tmp_path_factory.mktemp("logs") / "access.jsonl"
    doors = opened_doors(ServingConfig(http_port=0, grpc_port=0, access_log=str(log)))
    targets = Service(load_recipe(None), {"policy": policies.config("1")}, doors, None).targets()
    with deployed(targets, deadline_seconds=DEADLINE, stop_serve=True, start=http_door(doors.host, doors.http_port)) as applications:
        yield Running(doors, applications)


@pytest.fixture
def service(running: Running, policies: Policies) -> Running:
    """At version 1 again."""
    running.update(policy=policies.config("1"))
    return running


def test_a_new_version_is_swapped_in_place_under_load(service: Running, policies: Policies) -> None:
    process = service.process()
    with load(*service.ways_in) as under:
        service.update(policy=policies.config("2"))
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
    service.update(policy=policies.config("1").model_copy(update={"path": broken, "version": "3"}))
    answers = [ask() for ask in service.ways_in]
    assert {answer.version for answer in answers} == {"1"}
    check_answers(answers, policies.logprobs)
    assert broken in service.handle.describe.remote().result().refused
    assert service.process() == process


def test_models_and_other_applications_come_and_go(service: Running, policies: Policies) -> None:
    class Greeting:
        def __call__(self, request: Any) -> str:
            return "hello"

    process, doors = service.process(), process_of("ServeReplica:scoring:doors")
    with load(*service.ways_in) as under:
        greeting = serve.deployment(Greeting).options(ray_actor_options={"num_cpus": 0.1}).bind()
        service.update(target(greeting, "neighbour", "/hello"), policy=policies.config("1"), other=policies.config("2"))
        assert [each["name"] for each in service.models()] == ["other", "policy"]
        assert httpx.get(f"http://127.0.0.1:{service.doors.http_port}/hello").text == "hello"
        check_answers([by_grpc(service.doors.grpc_port, "other")(), by_http(service.doors.http_port, "other")()], policies.logprobs)
        service.update(policy=policies.config("1"))
        assert set(serve.status().applications) == {APPLICATION}
        assert [each["name"] for each in service.models()] == ["policy"]
    assert not under.failures
    check_answers(under.answers, policies.logprobs)
    assert service.process() == process
    assert process_of("ServeReplica:scoring:doors") == doors, "the doors were replaced, and open channels with them"


@pytest.mark.parametrize("victim", ["ProxyActor", "ServeReplica:scoring:doors", "ServeController"])
def test_a_killed_door_or_controller_comes_back(service: Running, policies: Policies, victim: str) -> None:
    """Raw callers at a killed door may see their connection break; nobody gets a wrong answer, and handles are not disturbed."""

    killed = process_of(victim)
    assert killed is not None
    ways_in = service.ways_in
    with load(*ways_in) as under, load(by_handle(service.handle)) as inside:
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: process_of(victim) not in (None, killed), seconds=DEADLINE, pause=0.1)
        if victim != "ServeController":
            wait_until(lambda: bool(under.failures) or not psutil.pid_exists(killed), seconds=DEADLINE, pause=0.1)
    assert not inside.failures
    if victim == "ServeController":
        assert not under.failures
    check_answers([*under.answers, *inside.answers, *(ask() for ask in ways_in)], policies.logprobs)


def test_what_the_dashboard_asks_for_is_exported(running: Running) -> None:
    asked = set(re.findall(r"ray_corral_\w+", DASHBOARD.read_text()))
    silent = {"ray_corral_scoring_padding_tokens_total", "ray_corral_scoring_cached_sequences_total"}  # nothing was padded, no cache is on
    node = ray.nodes()[0]
    metrics = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    wait_until(lambda: asked - silent <= set(re.findall(r"^(\w+){", httpx.get(metrics).text, re.MULTILINE)), seconds=DEADLINE, pause=0.1)


def test_other_changes_replace_replicas_under_load_and_stopping_answers_what_is_in_flight(running: Running, policies: Policies) -> None:
    """From now on each request waits half a second for its batch; the service is then stopped with requests in flight."""
    slow = policies.config("2", batching=BatchingConfig(wait_seconds=0.5))
    process = running.process()
    with load(*running.ways_in) as under:
        running.update(policy=slow)
        wait_until(lambda: under.answers[-1].version == "2", seconds=DEADLINE, pause=0.1)
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
