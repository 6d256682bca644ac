"""Where the service runs: replicas that follow the load, GPUs of their own, a Serve that jobs share, a config file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from click.testing import CliRunner
from ray import serve
from ray.serve.scripts import cli as serve_command

from app.config.rollout import RolloutConfig
from app.config.serving import BatchingConfig, ServedModelConfig
from app.config.shared import WorkersConfig
from app.errors import ConfigError
from app.workers.engine_settings import engine_options
from app.workers.processes import process_options
from jobs.main import main
from jobs.serving import APPLICATION
from serve import deploying
from serve.deploying import NO_DOORS, ServeGoneError, deploy, deployed, http_door, target
from serve.scoring import model_options, scoring_application
from tests.local_ray.service_load import DEADLINE, Policies, by_grpc, by_handle, by_http, check_answers, load
from tests.waiting import wait_until


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Policies:
    return Policies.make(tmp_path_factory.mktemp("policies"))


@pytest.fixture(scope="module")
def shared_serve() -> None:
    """One Serve for the first of these tests."""
    deploying.start_serve(NO_DOORS)


def test_replicas_follow_the_load(shared_serve: None, policies: Policies) -> None:
    """Every request waits half a second for its batch, as it would for a slow model."""
    batching = BatchingConfig(wait_seconds=0.5)
    config = policies.config(
        "1", max_replicas=2, target_ongoing_requests=2, upscale_delay_seconds=0, downscale_delay_seconds=1, batching=batching
    )

    def replicas() -> int:
        return serve.status().applications["scaled"].deployments["policy"].replica_states.get("RUNNING", 0)

    with deployed([target(scoring_application({"policy": config}), "scaled")], deadline_seconds=DEADLINE, stop_serve=True):
        assert replicas() == 1
        with load(*[by_handle(serve.get_deployment_handle("policy", "scaled"))] * 8) as under:
            wait_until(lambda: replicas() == 2, seconds=DEADLINE, pause=0.1)
        assert not under.failures
        wait_until(lambda: replicas() == 1, seconds=DEADLINE, pause=0.1)


def test_scorers_share_no_gpu_with_learners_and_engines(shared_serve: None, policies: Policies) -> None:
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
    engine = ray.remote(Probe).options(**engine_options(RolloutConfig(engines=WorkersConfig(cpus=0.1, gpus=1)), "DEFAULT")).remote()
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
    targets = [target(scoring_application({"policy": policies.config("1")}), "late")]
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
            wait_until(
                lambda: APPLICATION in serve.status().applications and serve.status().applications[APPLICATION].status == "RUNNING",
                seconds=DEADLINE,
                pause=0.1,
            )
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
