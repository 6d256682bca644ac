"""Chat over a real vLLM engine behind Ray Serve, asked by the public OpenAI client."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from ray import serve

from app.config.serving import ChatModelConfig
from app.config.shared import WorkersConfig
from app.errors import ConfigError, ModelError
from serve.chat import chat_application, chat_target, check_chat_models
from tests.tiny_models import CONTEXT, make_bert, make_llama, make_reward_model

TOKEN = "open sesame"
QUESTION = [{"role": "user", "content": "Hello"}]
PROMPT_TOKENS = len("Hello") + 3  # the roles' two tokens and the end of the user's turn


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def address(folder: str) -> Iterator[str]:
    """Where the model `pet` answers."""
    models = {"pet": ChatModelConfig(path=folder, kv_cache_gib=0.1, workers=WorkersConfig(cpus=0.5))}
    check_chat_models(models)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run_many([chat_target(chat_application(models, token=TOKEN))])
    yield f"http://127.0.0.1:{port}/v1"
    serve.shutdown()


@pytest.fixture(scope="module")
def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=address, api_key=TOKEN, max_retries=0)


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
    with pytest.raises(openai.AuthenticationError, match="no valid token"):
        openai.OpenAI(base_url=address, api_key="guess", max_retries=0).models.list()


def test_what_cannot_be_chatted_with(folder: str, tmp_path: Path) -> None:
    reward = make_reward_model(tmp_path / "reward", folder)
    for path, reason in (
        (reward, "writes no answers"),
        (make_bert(tmp_path / "bert"), "writes no answers"),
        ("./nowhere", "no such folder"),
    ):
        with pytest.raises(ModelError, match=reason):
            check_chat_models({"pet": ChatModelConfig(path=path)})
    with pytest.raises(ConfigError, match="whole GPUs"):
        check_chat_models({"pet": ChatModelConfig(path=folder, workers=WorkersConfig(gpus=1.5))})
    with pytest.raises(ConfigError, match=r"conversation of 128 tokens needs 0\.00012 GiB of KV cache, and kv_cache_gib is 0\.0001"):
        check_chat_models({"pet": ChatModelConfig(path=folder, kv_cache_gib=0.0001)})
