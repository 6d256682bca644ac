"""The service as an operator sees it on a real Ray Serve: updates, scaling, neighbours, GPUs, and jobs that share one Serve."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import pytest
import ray
import torch
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from app.config.serving import BatchingConfig, ServedModelConfig
from app.config.shared import WorkersConfig
from app.errors import ScoringError
from app.models.forward import pad_sequences, sequence_logprobs
from app.models.load import load_causal_lm
from app.workers.processes import process_options
from app.workers.rollout import engine_options
from app.workers.scoring_messages import ScoringAnswer, ScoringRequest
from serve import deploying
from serve.deploying import NO_DOORS, ServeGoneError, deploy, deployed, target
from serve.replicas import ModelReplica
from serve.scoring import model_options, scoring_application
from tests.tiny_models import make_neox

IDS = np.arange(4, 24, dtype=np.int32)
REQUEST = ScoringRequest(IDS, np.array([len(IDS)], dtype=np.int32), "logprobs")
DEADLINE = 60.0


@dataclass(frozen=True)
class Policies:
    """Two versions of a model and what each answers to REQUEST."""

    paths: Mapping[str, str]
    answers: Mapping[str, np.ndarray]


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Policies:
    root = tmp_path_factory.mktemp("policies")
    paths = {version: make_neox(root / version, seed=int(version)) for version in ("1", "2")}
    with torch.no_grad():
        answers = {version: sequence_logprobs(load_causal_lm(path), *pad_sequences([IDS]))[0].numpy() for version, path in paths.items()}
    assert np.abs(answers["1"] - answers["2"]).max() > 0.01
    return Policies(paths, answers)


def policy(policies: Policies, version: str, cpus: float = 0.1, **more: object) -> ServedModelConfig:
    return ServedModelConfig(path=policies.paths[version], version=version, workers=WorkersConfig(cpus=cpus), **more)


@pytest.fixture
def service(policies: Policies) -> Iterator[DeploymentHandle[ModelReplica]]:
    """One model, version 1, in the application `operated`."""
    with deployed([target(scoring_application({"policy": policy(policies, "1")}), "operated")], deadline_seconds=DEADLINE, stop_serve=True):
        yield serve.get_deployment_handle("policy", "operated")


def update(models: Mapping[str, ServedModelConfig]) -> None:
    deploy([target(scoring_application(models), "operated")], DEADLINE)


@dataclass
class Load:
    """Callers that ask without a pause; what they were answered."""

    handle: DeploymentHandle[ModelReplica]
    answers: list[ScoringAnswer] = field(default_factory=list)
    failures: list[Exception] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    def call(self) -> None:
        while not self.stop.is_set():
            try:
                self.answers.append(self.handle.infer.remote(REQUEST).result(timeout_s=DEADLINE))
            except (ScoringError, RayError, RayServeException, TimeoutError) as failure:
                self.failures.append(failure)

    def wait_for(self, reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE
        while not reached():
            assert time.monotonic() < deadline, "the load never saw it"
            time.sleep(0.05)


@contextmanager
def load(handle: DeploymentHandle[ModelReplica], callers: int = 4) -> Iterator[Load]:
    under = Load(handle)
    with ThreadPoolExecutor(callers) as pool:
        futures = [pool.submit(under.call) for _ in range(callers)]
        under.wait_for(lambda: len(under.answers) >= callers)
        try:
            yield under
            seen = len(under.answers)
            under.wait_for(lambda: len(under.answers) >= seen + 2 * callers)
        finally:
            under.stop.set()
    for future in futures:
        future.result()


def check_answers(under: Load, policies: Policies) -> None:
    """None lost, and each wholly of the version that it names."""
    assert not under.failures
    for answer in under.answers:
        np.testing.assert_allclose(answer.values, policies.answers[answer.model.version], atol=1e-5)
    assert len({(answer.model.version, answer.model.weights_hash) for answer in under.answers}) == 2


def test_a_new_version_is_swapped_in_place_under_load(service: DeploymentHandle[ModelReplica], policies: Policies) -> None:
    process = service.stats.remote().result()["pid"]
    with load(service) as under:
        update({"policy": policy(policies, "2")})
        assert service.infer.remote(REQUEST).result().model.version == "2"
    check_answers(under, policies)
    assert under.answers[-1].model.version == "2"
    assert service.stats.remote().result()["pid"] == process, "the replica was replaced"


def test_other_changes_replace_replicas_under_load(service: DeploymentHandle[ModelReplica], policies: Policies) -> None:
    process = service.stats.remote().result()["pid"]
    with load(service) as under:
        update({"policy": policy(policies, "2", cpus=0.2)})
        under.wait_for(lambda: under.answers[-1].model.version == "2")
    check_answers(under, policies)
    assert service.stats.remote().result()["pid"] != process


def test_models_come_and_go_beside_one_that_stays(service: DeploymentHandle[ModelReplica], policies: Policies) -> None:
    process = service.stats.remote().result()["pid"]
    update({"policy": policy(policies, "1"), "other": policy(policies, "2")})
    other = serve.get_deployment_handle("other", "operated")
    np.testing.assert_allclose(other.infer.remote(REQUEST).result().values, policies.answers["2"], atol=1e-5)
    update({"policy": policy(policies, "1")})
    assert set(serve.status().applications["operated"].deployments) == {"policy"}
    assert service.stats.remote().result()["pid"] == process


def test_replicas_follow_the_load(policies: Policies) -> None:
    """Slow batches stand for a slow model: every request waits for half a second."""
    config = policy(
        policies,
        "1",
        max_replicas=2,
        target_ongoing_requests=2,
        upscale_delay_seconds=0,
        downscale_delay_seconds=1,
        batching=BatchingConfig(wait_seconds=0.5),
    )

    def replicas() -> int:
        return serve.status().applications["scaled"].deployments["policy"].replica_states.get("RUNNING", 0)

    with deployed([target(scoring_application({"policy": config}), "scaled")], deadline_seconds=DEADLINE, stop_serve=True):
        assert replicas() == 1
        with load(serve.get_deployment_handle("policy", "scaled"), callers=8) as under:
            under.wait_for(lambda: replicas() == 2)
        assert not under.failures
        under.wait_for(lambda: replicas() == 1)


def test_a_serve_that_its_starter_stops_is_started_again(policies: Policies, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job that had started Serve ends between this job's look for it and its deployment."""
    targets = [target(scoring_application({"policy": policy(policies, "1")}), "late")]
    with pytest.raises(ServeGoneError):
        deploy(targets, DEADLINE)  # no Serve at all
    deploying.start_serve(NO_DOORS)
    genuine, calls = deploying.deploy, []

    def after_the_starter_has_gone(*arguments: object) -> None:
        calls.append(arguments)
        if len(calls) == 1:
            serve.shutdown()
        genuine(*arguments)

    monkeypatch.setattr(deploying, "deploy", after_the_starter_has_gone)
    with deployed(targets, deadline_seconds=DEADLINE, stop_serve=True):
        assert len(calls) == 2
        assert serve.get_deployment_handle("policy", "late").infer.remote(REQUEST).result().model.version == "1"
    assert not deploying.serve_is_running(), "whoever starts Serve in the end also stops it"


def test_scorers_share_no_gpu_with_learners_and_engines(policies: Policies) -> None:
    """Logical GPUs: processes that are started as the real ones are, with the real ones' options, but load nothing on a GPU."""

    class Probe:
        def gpus(self) -> list[str]:
            return ray.get_runtime_context().get_accelerator_ids()["GPU"]

        def reconfigure(self, settings: object) -> None:
            """Takes a model's user config."""

    learner = ray.remote(Probe).options(**process_options(WorkersConfig(cpus=0.1, gpus=1))).remote()
    engine = ray.remote(Probe).options(**engine_options(WorkersConfig(cpus=0.1, gpus=1), "DEFAULT")).remote()
    taken = ray.get([learner.gpus.remote(), engine.gpus.remote()])

    def scorer(name: str, gpus: float) -> serve.Application:
        config = ServedModelConfig(path=policies.paths["1"], workers=WorkersConfig(cpus=0.1, gpus=gpus))
        return serve.deployment(name=name, **model_options(config))(Probe).bind()

    targets = [target(scorer(name, gpus), name) for name, gpus in (("reward", 1), ("reference", 0.5), ("second", 0.5))]
    with deployed(targets, deadline_seconds=DEADLINE, stop_serve=True):
        own = [serve.get_deployment_handle(each.name, each.name).gpus.remote().result() for each in targets]
    assert all(len(ids) == 1 for ids in (*taken, *own))
    whole = [*taken, own[0]]
    shared = {own[1][0], own[2][0]}
    assert len({ids[0] for ids in whole}) == 3
    assert shared.isdisjoint(ids[0] for ids in whole), "a fraction never comes off a GPU that somebody has whole"
    for actor in (learner, engine):
        ray.kill(actor)
