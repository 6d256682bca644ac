"""What a replica answers and refuses, with real models and without Ray; batches and deaths are in tests/local_ray/test_scoring.py."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch

from app.config.serving import BatchingConfig, Output, ServedModelConfig
from app.errors import BadRequestError, ScoringError, TooLongError
from app.models.forward import pad_sequences, sequence_logprobs
from app.models.load import load_causal_lm
from app.models.scoring import ScoringModel
from app.workers.scoring_client import flatten
from app.workers.scoring_messages import ScoringAnswer, ScoringRequest
from serve.replicas import ModelReplica
from tests.tiny_models import CONTEXT, VOCABULARY, make_llama, make_neox, make_reward_model


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_llama(tmp_path_factory.mktemp("models") / "first")


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_llama(tmp_path_factory.mktemp("models") / "second", seed=1)


def sequences(count: int = 3) -> list[np.ndarray]:
    generator = np.random.default_rng(count)
    return [generator.integers(0, VOCABULARY, 5 + 3 * row).astype(np.int32) for row in range(count)]


def request(rows: list[np.ndarray], output: Output = "logprobs", **more: bool) -> ScoringRequest:
    return ScoringRequest(*flatten(rows), output, **more)


def infer(replica: ModelReplica, *requests: ScoringRequest) -> list[ScoringAnswer | BaseException]:
    async def together() -> list[ScoringAnswer | BaseException]:
        return await asyncio.gather(*map(replica.infer, requests), return_exceptions=True)

    return asyncio.run(together())


def test_a_reference_model_gives_logprobs_and_by_name_logits(language_model: str) -> None:
    replica, rows = ModelReplica("reference", ServedModelConfig(path=language_model)), sequences()
    logprobs, logits = infer(replica, request(rows), request(rows, "logits"))
    model = load_causal_lm(language_model)
    with torch.no_grad():
        direct = [sequence_logprobs(model, *pad_sequences([ids]))[0].numpy() for ids in rows]
        full = [model(torch.as_tensor(ids[None].astype("int64"))).logits[0].numpy() for ids in rows]
    np.testing.assert_allclose(logprobs.values, np.concatenate(direct), atol=1e-5)
    assert logits.values.dtype == np.float16 and logits.values.shape == (sum(map(len, rows)), VOCABULARY)
    np.testing.assert_allclose(logits.values, np.concatenate(full), atol=1e-3, rtol=1e-3)
    assert logprobs.model == logits.model
    assert (logprobs.model.name, logprobs.model.version) == ("reference", "1") and len(logprobs.model.weights_hash) == 32


def test_what_one_request_has_wrong_fails_no_other(language_model: str) -> None:
    replica, rows = ModelReplica("reference", ServedModelConfig(path=language_model)), sequences()
    long = np.zeros(CONTEXT + 1, dtype=np.int32)
    foreign = np.array([VOCABULARY, 0], dtype=np.int32)
    answers = infer(replica, request(rows), request(rows, "rewards"), request([long]), request([foreign]), request(rows))
    assert [type(answer) for answer in answers] == [ScoringAnswer, BadRequestError, TooLongError, BadRequestError, ScoringAnswer]


def test_an_answer_that_is_not_finite_is_an_error_of_its_own_request(tmp_path: Path) -> None:
    folder = make_neox(tmp_path)  # whose head does not share the broken embedding
    replica = ModelReplica("reference", ServedModelConfig(path=folder, batching=BatchingConfig(wait_seconds=0.05)))
    with torch.no_grad():
        replica._loaded.model.model.get_input_embeddings().weight[9] = torch.nan
    good, bad = np.array([5, 6, 7], dtype=np.int32), np.array([5, 9, 7], dtype=np.int32)
    answers = infer(replica, request([good]), request([good, bad]), request([good]))
    assert [type(answer) for answer in answers] == [ScoringAnswer, ScoringError, ScoringAnswer]
    assert np.isfinite(answers[0].values).all()


def test_a_replica_whose_device_has_failed_is_not_healthy(language_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    replica = ModelReplica("reference", ServedModelConfig(path=language_model))

    def fail(*arguments: object, **more: object) -> None:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    asyncio.run(replica.check_health())
    monkeypatch.setattr(replica._loaded.model, "answers", fail)
    (answer,) = infer(replica, request(sequences()))
    assert isinstance(answer, torch.AcceleratorError)
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        asyncio.run(replica.check_health())


def test_other_weights_are_taken_in_place_and_named_by_every_answer(language_model: str, other_model: str) -> None:
    config = ServedModelConfig(path=language_model, batching=BatchingConfig(cache_entries=8))
    replica, rows = ModelReplica("reference", config), sequences()
    (first,) = infer(replica, request(rows))
    asyncio.run(replica.reconfigure({"path": other_model, "version": "2"}))
    (second,) = infer(replica, request(rows))
    (direct,) = infer(ModelReplica("reference", ServedModelConfig(path=other_model)), request(rows))
    assert second.model.version == "2" and second.model.weights_hash == direct.model.weights_hash != first.model.weights_hash
    np.testing.assert_allclose(second.values, direct.values, atol=1e-6)
    assert asyncio.run(replica.describe()).path == other_model


def test_known_answers_are_not_computed_again_except_alone(language_model: str) -> None:
    config = ServedModelConfig(path=language_model, batching=BatchingConfig(cache_entries=3))
    replica, rows = ModelReplica("reference", config), sequences(4)

    def computed(*requests: ScoringRequest) -> int:
        before = asyncio.run(replica.stats()).get("sequences", 0)
        for one in requests:
            (answer,) = infer(replica, one)
            assert isinstance(answer, ScoringAnswer)
            np.testing.assert_array_equal(answer.values.shape, [int((one.lengths - 1).sum())])
        return asyncio.run(replica.stats())["sequences"] - before

    assert computed(request(rows[:3])) == 3
    assert computed(request([rows[2], rows[0]])) == 0
    assert computed(request(rows)) == 1
    assert computed(request(rows[:1])) == 1, "the oldest answer was not dropped"
    assert computed(request(rows[3:], alone=True)) == 1


def test_the_weights_hash_tells_weights_and_settings_apart(language_model: str, tmp_path: Path) -> None:
    reward = make_reward_model(tmp_path / "reward", language_model, reward_offset=0.5)
    model, again = ScoringModel(language_model, "reference"), ScoringModel(language_model, "reference")
    assert model.weights_hash == again.weights_hash
    again.model.config.rope_theta = 123.0
    del again.weights_hash
    assert model.weights_hash != again.weights_hash
    offset, other = ScoringModel(reward, "reward"), ScoringModel(reward, "reward")
    other.model.config.reward_offset = 0.25
    assert offset.weights_hash != other.weights_hash
