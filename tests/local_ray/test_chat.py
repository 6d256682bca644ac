"""Chat over a real vLLM engine behind Ray Serve, asked by the public OpenAI client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
import torch
from ray.util.state import list_actors

from app.config.loading import load_recipe
from app.config.serving import ChatModelConfig
from app.errors import ConfigError, ModelError
from app.models.forward import pad_sequences
from app.models.heads import load_reward_model, sequence_scores
from jobs.serving import Service, check
from serve.chat import check_chat_models
from serve.deploying import deploy, deployed
from tests.tiny_models import CONTEXT, make_bert, make_llama, make_reward_model

TOKEN, OFFSET, DEADLINE = "open-sesame", 0.25, 200.0
QUESTION = [{"role": "user", "content": "Hello"}]
PROMPT_TOKENS = len("Hello") + 3  # the roles' two tokens and the end of the user's turn


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs") / "access.log"


@pytest.fixture(scope="module")
def service(folder: str, log: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """What `corral serve` runs for the model `pet` to chat with beside the reward model `judge`."""
    token = tmp_path_factory.mktemp("secrets") / "token"
    token.write_text(TOKEN)
    words = {
        "models.judge.path": make_reward_model(tmp_path_factory.mktemp("models") / "judge", folder, reward_offset=OFFSET),
        "models.judge.workers.cpus": 0.1,
        "chat.pet.path": folder,
        "chat.pet.workers.cpus": 0.5,
        "chat.pet.kv_cache_gib": 0.1,
        "token_file": token,
        "access_log": log,
        "http_port": 0,
        "grpc_port": 0,
    }
    service = check(load_recipe(None, [f"--serving.{key}={value}" for key, value in words.items()]))
    http = {"host": service.doors.host, "port": service.doors.http_port}
    start = {"proxy_location": "HeadOnly", "http_options": http}
    with deployed(service.targets(), deadline_seconds=DEADLINE, stop_serve=True, start=start):
        yield service


@pytest.fixture(scope="module")
def address(service: Service) -> str:
    return f"http://{service.doors.host}:{service.doors.http_port}"


@pytest.fixture(scope="module")
def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key=TOKEN, max_retries=0)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["pet"]
    assert client.models.retrieve("pet").id == "pet"


def test_an_answer_whole_and_in_pieces(client: openai.OpenAI) -> None:
    asked = {"model": "pet", "messages": QUESTION, "temperature": 0, "max_tokens": 12}
    whole = client.chat.completions.create(**asked)
    text, usage = whole.choices[0].message.content, whole.usage
    assert whole.choices[0].finish_reason == "length"
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (PROMPT_TOKENS, 12, PROMPT_TOKENS + 12)

    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == text
    assert sum(map(bool, pieces)) > 3, "it comes in pieces"
    assert chunks[-1].usage == usage

    stopped = client.chat.completions.create(**asked, stop=[text[3:5]])
    assert stopped.choices[0].message.content == text[:3]
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.usage.completion_tokens < 12


def test_temperature_and_seed(client: openai.OpenAI) -> None:
    def sample(seed: int, temperature: float = 1.0) -> str:
        return (
            client.chat.completions.create(model="pet", messages=QUESTION, temperature=temperature, max_tokens=10, seed=seed)
            .choices[0]
            .message.content
        )

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(5)}) > 1
    assert len({sample(seed, temperature=0) for seed in range(5)}) == 1


def test_what_is_refused(client: openai.OpenAI, address: str) -> None:
    def refused(kind: type[openai.APIStatusError], **asked: object) -> str:
        with pytest.raises(kind) as caught:
            client.chat.completions.create(**{"model": "pet", "messages": QUESTION, "max_tokens": 4} | asked)
        assert caught.value.body["type"] == "invalid_request_error", "an error of OpenAI's form"
        return caught.value.body["message"]

    assert '"cat"' in refused(openai.NotFoundError, model="cat")
    long = [{"role": "user", "content": "x" * CONTEXT}]
    for stream in (False, True):
        assert f"maximum context length is {CONTEXT} tokens" in refused(openai.BadRequestError, messages=long, stream=stream)
    assert refused(openai.BadRequestError, temperature="hot").startswith("temperature: ")
    assert "max_tokens" in refused(openai.BadRequestError, max_tokens=-3)
    with pytest.raises(openai.AuthenticationError, match="Authorization: Bearer TOKEN"):
        openai.OpenAI(base_url=f"{address}/v1", api_key="guess", max_retries=0).models.list()


def test_beside_the_scorers(address: str, folder: str, service: Service, log: Path) -> None:
    asked = {"model": "judge", "ids": [[5, 6, 7]]}
    answer = httpx.post(f"{address}/score", json=asked, headers={"authorization": f"Bearer {TOKEN}"})
    assert answer.status_code == 200, answer.text
    with torch.no_grad():
        score = float(sequence_scores(load_reward_model(service.models["judge"].path), *pad_sequences([np.array([5, 6, 7])])))
    assert answer.json()["rewards"] == pytest.approx([score - OFFSET], abs=1e-5)
    entries = [(entry["method"], entry["status"]) for entry in map(json.loads, log.read_text().splitlines())]
    assert {("POST /score", "200"), ("POST /v1/chat/completions", "200"), ("POST /v1/chat/completions", "404")} <= set(entries)


def test_an_update_of_other_models_leaves_the_engine_alone(service: Service, client: openai.OpenAI) -> None:
    def engine() -> list[str]:
        return [actor.actor_id for actor in list_actors(filters=[("class_name", "=", "ServeReplica:chat:pet"), ("state", "=", "ALIVE")])]

    before = engine()
    judge = service.models["judge"].model_copy(update={"version": "2"})
    deploy(replace(service, models={"judge": judge}).targets(), DEADLINE)
    assert engine() == before and len(before) == 1
    assert client.chat.completions.create(model="pet", messages=QUESTION, max_tokens=2).usage.completion_tokens > 0


def test_what_cannot_be_chatted_with(folder: str, tmp_path: Path) -> None:
    reward = make_reward_model(tmp_path / "reward", folder)
    for path, reason in (
        (reward, "writes no answers"),
        (make_bert(tmp_path / "bert"), "writes no answers"),
        ("./nowhere", "no such folder"),
    ):
        with pytest.raises(ModelError, match=reason):
            check_chat_models({"pet": ChatModelConfig(path=path)})
    with pytest.raises(ConfigError, match=r"conversation of 128 tokens needs 0\.00012 GiB of KV cache, and kv_cache_gib is 0\.0001"):
        check_chat_models({"pet": ChatModelConfig(path=folder, kv_cache_gib=0.0001)})
