"""`corral serve`: its options, what it refuses before Ray starts, and the config file it writes."""

from __future__ import annotations

import json
import queue
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve._private.build_app import build_app

from app.config.loading import load_recipe
from app.config.served_models import named_models
from app.errors import ConfigError
from jobs import serving
from jobs.main import main
from serve import builders
from serve.access import bearer_token


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., str]:
    """Writes what is looked at before a model is loaded."""

    def write(name: str, **config: object) -> str:
        path = tmp_path / name
        path.mkdir()
        (path / "config.json").write_text(json.dumps(config))
        (path / "tokenizer.json").write_text("{}")
        (path / "model.safetensors").touch()
        return str(path)

    return write


REWARD = {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"], "num_labels": 1}
LANGUAGE = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    import ray

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("CORRAL_SERVE_TOKEN", raising=False)
    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("Ray was started"))

    def run(*words: str) -> str:
        assert main(["serve", *words]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    return run


def test_short_options_are_recipe_keys(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[serving.models.old]\npath = "a"\nversion = "3"\n')
    assert main(["serve", str(recipe), "--model", "new=b", "--chat", "talk=c", "--http-port=9", "--grpc-port=0", "--dry-run"]) == 0
    printed = tmp_path / "printed.toml"
    printed.write_text(capsys.readouterr().out)
    config = load_recipe(printed).serving
    assert {name: (model.path, model.version) for name, model in config.models.items()} == {"old": ("a", "3"), "new": ("b", "1")}
    assert config.chat["talk"].path == "c"
    assert (config.host, config.http_port, config.grpc_port) == ("127.0.0.1", 9, 0)
    assert "new " in printed.read_text().partition("derived sizes")[2], "the placement shows every model"


def test_a_dry_run_tells_what_would_be_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("jobs.local_ray.local_gpus", lambda: 0)
    assert main(["serve", "--model", "reward=./nowhere", "--serving.models.reward.workers.gpus=4", "--dry-run"]) == 0
    refusals = [line for line in capsys.readouterr().out.splitlines() if line.startswith("# would be refused here and now: ")]
    assert "needs 4 GPUs" in refusals[0] and "./nowhere: no such folder" in refusals[1]


def test_what_is_served_where_no_model_is_named() -> None:
    recipe = load_recipe(None, ["--reward.path=r", "--model.path=m", "--rollout.temperature=0.7", "--scoring.reward.count=2"])
    models = named_models(recipe)
    assert {name: model.path for name, model in models.items()} == {"reward": "r", "reference": "m"}
    assert models["reward"].workers.count == 2
    assert models["reference"].temperature == 0.7


def test_refusals_before_ray_starts(refused: Callable[..., str], folder: Callable[..., str], tmp_path: Path) -> None:
    reward, language = folder("rm", **REWARD), folder("sft", **LANGUAGE)
    assert "no model to serve" in refused()
    assert "NAME=FOLDER" in refused("--model", "nameless")
    assert "no such folder" in refused(f"--model=a={tmp_path}/nowhere")
    assert "needs a model's folder" in refused(f"--reward.path={reward}")
    assert "not a language model" in refused(f"--reward.path={reward}", f"--model.path={reward}")
    assert "encoder" in refused(f"--model=a={folder('bert', model_type='bert', architectures=['BertModel'])}")
    assert "one label" in refused(f"--model=a={folder('many', **{**REWARD, 'num_labels': 3})}")
    assert "a/b" in refused(f"--model=a/b={reward}")
    assert "doors" in refused(f"--model=doors={reward}")
    assert "not a language model" in refused(f"--model=a={reward}", "--serving.models.a.kind=reference")
    assert "temperature" in refused(f"--model=a={reward}", "--serving.models.a.temperature=0.5")
    assert "max_replicas" in refused(f"--model=a={language}", "--serving.models.a.workers.count=3", "--serving.models.a.max_replicas=2")
    assert "serving.models.a.workers" in refused(f"--model=a={language}", "--serving.models.a.workers.gpus=100")
    assert "two ports" in refused(f"--model=a={language}", "--http-port=7000", "--grpc-port=7000")
    assert "chat template" in refused(f"--chat=a={language}")


def test_ports_and_hosts(refused: Callable[..., str], folder: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = f"--model=a={folder('sft', **LANGUAGE)}"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"grpc_port = {port}: cannot listen" in refused(model, "--http-port=0", f"--grpc-port={port}")
    assert "no such host" in refused(model, "--host=nowhere.invalid")
    assert "need no token" in refused(model, "--host=0.0.0.0", "--http-port=0", "--grpc-port=0")
    empty = tmp_path / "empty"
    empty.touch()
    assert "holds no token" in refused(model, f"--token-file={empty}")
    assert "cannot be read" in refused(model, f"--token-file={tmp_path}/nowhere")


def test_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CORRAL_SERVE_TOKEN", raising=False)
    open_to_all = load_recipe(None, ["--serving.host=0.0.0.0"]).serving
    with pytest.raises(ConfigError, match="token_file"):
        bearer_token(open_to_all)
    monkeypatch.setenv("CORRAL_SERVE_TOKEN", "secret")
    assert bearer_token(open_to_all) == "secret"
    file = tmp_path / "token"
    file.write_text("other\n")
    assert bearer_token(open_to_all.model_copy(update={"token_file": str(file)})) == "other"


def test_a_config_file_for_serve_deploy(folder: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder("sft", **LANGUAGE)
    (tmp_path / "token").write_text("secret")
    words = ["--model=a=sft", "--serving.models.a.version=7", "--http-port=0", "--serving.max_request_bytes=5000"]
    words += ["--token-file=token", "--serving.access_log=access.jsonl"]
    assert main(["serve", "build", *words, "-o", "out/service.yaml"]) == 0
    document = yaml.safe_load((tmp_path / "out" / "service.yaml").read_text())
    assert document["http_options"]["host"] == "127.0.0.1"
    (application,) = document["applications"]
    assert application["deployments"] == [{"name": "a", "user_config": {"path": str(tmp_path / "sft"), "version": "7"}}]
    assert application["args"]["serving.max_request_bytes"] == 5000
    assert application["args"]["serving.models"]["a"]["path"] == str(tmp_path / "sft")
    assert application["args"]["serving.token_file"] == str(tmp_path / "token")
    assert application["args"]["serving.access_log"] == str(tmp_path / "access.jsonl")
    assert application["args"]["serving.http_port"] == document["http_options"]["port"] > 0


def test_the_builder_of_serves_own_commands(folder: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CORRAL_SERVE_TOKEN", raising=False)
    given = {
        "serving.models.a.path": folder("sft", **LANGUAGE),
        "serving.models.a.version": "7",
        "serving.grpc_port": "9",
    }  # as of the shell
    application = call_user_app_builder_with_args_if_necessary(builders.scoring, given)
    deployments = {deployment.name: deployment for deployment in build_app(application, name="scoring").deployments}
    assert deployments.keys() == {"a", "doors"}
    assert deployments["a"].user_config == {"path": given["serving.models.a.path"], "version": "7"}
    with pytest.raises(ConfigError, match="need no token"):
        builders.scoring({**given, "serving.host": "0.0.0.0"})


def test_hangups_update_and_a_failed_update_leaves_the_service_up(capsys: pytest.CaptureFixture[str]) -> None:
    calls: queue.SimpleQueue[str] = queue.SimpleQueue()

    def update() -> None:
        calls.put("update")
        if calls.qsize() == 1:
            signal.raise_signal(signal.SIGHUP)
            raise ConfigError("bad recipe")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        serving.wait(update, started=lambda: signal.raise_signal(signal.SIGHUP))
    assert calls.qsize() == 2
    assert capsys.readouterr().err == "corral: not updated: bad recipe\n"
