"""The scoring service on a real Ray Serve, against direct forward passes."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from ray import serve
from ray.util.state import list_actors
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from app.config.scoring import ScoringConfig
from app.config.shared import WorkersConfig
from app.data.templates import build_template
from app.errors import DeadlineError, ScoringError, ScoringTimeoutError
from app.experience import FinishReason, Prompt, Rollout
from app.models.forward import pad_sequences, sequence_logprobs
from app.models.heads import load_reward_model, reward_offset, sequence_scores
from app.models.load import load_causal_lm, load_tokenizer
from app.models.replies import Rewriter
from app.rewards.reward_model import RewardModelReward
from app.workers import scoring_client
from app.workers.scoring_client import ServeScorer
from serve.scoring import connect, start_scoring
from tests.tiny_models import CONTEXT, VOCABULARY, make_foreign_reward_model, make_llama, make_neox, make_reward_model
from tests.waiting import wait_until

TEMPERATURE, OFFSET = 0.7, 0.25
DEADLINE = 300.0
CONFIG = ScoringConfig(
    reward=WorkersConfig(count=2, cpus=0.25),
    reference=WorkersConfig(cpus=0.25),
    max_batch_tokens=256,
    batch_wait_seconds=0.3,
    timeout_seconds=60,
)


@dataclass(frozen=True)
class Folders:
    reference: str
    reward: str
    second_reward: str


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("models")
    reward = make_reward_model(root / "reward", make_llama(root / "llama"), reward_offset=OFFSET)
    reference = make_neox(root / "reference")
    return Folders(reference, reward, make_foreign_reward_model(root / "second"))


@pytest.fixture(scope="module")
def scorer(folders: Folders) -> Iterator[ServeScorer]:
    rewards = [folders.reward, folders.second_reward]
    with start_scoring(CONFIG, reward_paths=rewards, reference_path=folders.reference, temperature=TEMPERATURE) as (scorer, _):
        yield scorer


def random_sequences(count: int, seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, VOCABULARY, generator.integers(1, 40)).astype(np.int32) for _ in range(count)]


@cache
def reward_model(path: str) -> PreTrainedModel:
    return load_reward_model(path)


@cache
def reference_model(path: str) -> PreTrainedModel:
    return load_causal_lm(path)


@torch.no_grad()
def direct_scores(folder: str, sequences: list[np.ndarray]) -> list[float]:
    model = reward_model(folder)
    return [float(sequence_scores(model, *pad_sequences([ids]))) - reward_offset(model) for ids in sequences]


@torch.no_grad()
def direct_logprobs(folders: Folders, ids: np.ndarray) -> np.ndarray:
    return sequence_logprobs(reference_model(folders.reference), *pad_sequences([ids]), temperature=TEMPERATURE)[0].numpy()


def test_answers_equal_direct_forward_passes(scorer: ServeScorer, folders: Folders) -> None:
    sequences = random_sequences(60)
    scores, logprobs = scorer.scores(sequences), scorer.logprobs(sequences)
    np.testing.assert_allclose(scores.result(), direct_scores(folders.reward, sequences), atol=1e-5)
    for ids, row in zip(sequences, logprobs.result(), strict=True):
        assert row.dtype == np.float32
        assert row.shape == (len(ids) - 1,)
        np.testing.assert_allclose(row, direct_logprobs(folders, ids), atol=1e-5)


def test_a_further_reward_model_of_a_mix_is_one_more_model_of_the_service(scorer: ServeScorer, folders: Folders) -> None:
    sequences = random_sequences(5)
    second = pickle.loads(pickle.dumps(connect("scoring", CONFIG, "reward-2")))
    scores, logprobs = second.scores(sequences).result(), second.logprobs(sequences).result()
    np.testing.assert_allclose(scores, direct_scores(folders.second_reward, sequences), atol=1e-5)
    np.testing.assert_allclose(logprobs[-1], direct_logprobs(folders, sequences[-1]), atol=1e-5)


def test_a_reward_model_of_another_tokenizer_scores_what_its_chat_template_makes_of_the_text(scorer: ServeScorer, folders: Folders) -> None:
    """A finished answer, one that was cut off, and what plain transformers says of both."""
    policy = build_template("auto", load_tokenizer(folders.reference))
    judge = RewardModelReward(connect("scoring", CONFIG, "reward-2"), Rewriter.of(folders.second_reward, policy.decode))
    rollouts = []
    for finish, ending in ((FinishReason.STOP, [policy.eos_id]), (FinishReason.LENGTH, [])):
        ids = np.array([*policy.encode_text("A planet, partner!"), *ending], np.int32)
        prompt = Prompt("p", "Which?", np.array([7], np.int32), ({"role": "user", "content": "Which?"},))
        rollouts.append(Rollout(prompt, 0, ids, np.zeros(len(ids), np.float32), finish, np.zeros(len(ids), np.int32)))
    tokenizer = AutoTokenizer.from_pretrained(folders.second_reward)
    model = AutoModelForSequenceClassification.from_pretrained(folders.second_reward)
    turns = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "A planet, partner!"}]
    ids_1S = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)["input_ids"]
    with torch.no_grad():
        expected = [model(input_ids=ids_1S).logits.item(), model(input_ids=ids_1S[:, :-2]).logits.item()]
    assert judge.score(rollouts).result() == pytest.approx(expected, abs=1e-4)


def test_nothing_to_score(scorer: ServeScorer) -> None:
    assert scorer.scores([]).result() == []
    assert scorer.logprobs([]).result() == []


def test_concurrent_callers_share_forward_passes(scorer: ServeScorer) -> None:
    before = scorer.stats()["reference"]
    calls = [random_sequences(1, seed=seed) for seed in range(6)]
    start = threading.Barrier(len(calls))

    def call(sequences: list[np.ndarray]) -> int:
        start.wait()
        return len(connect("scoring", CONFIG).logprobs(sequences).result())

    with ThreadPoolExecutor(len(calls)) as pool:
        assert list(pool.map(call, calls)) == [1] * len(calls)
    after = scorer.stats()["reference"]
    assert after["requests"] - before["requests"] == len(calls)
    assert after["batches"] - before["batches"] < len(calls)
    assert after["largest_batch"] > 1


@pytest.mark.parametrize(
    ("sequence", "reason"),
    [
        (np.array([], dtype=np.int32), "empty"),
        (np.array([5, VOCABULARY]), "vocabulary"),
        (np.array([5, -1]), "non-negative"),
        (np.zeros(CONTEXT + 1, dtype=np.int32), "context"),
        (np.zeros((2, 2), dtype=np.int32), "one-dimensional"),
        (np.array([0.5]), "integer"),
    ],
)
def test_bad_requests_are_refused_and_harm_nobody_else(
    scorer: ServeScorer, sequence: np.ndarray, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent_again: list[int] = []

    def pause(attempt: int) -> float:
        sent_again.append(attempt)
        return 0.0

    good = scorer.scores(random_sequences(3))
    monkeypatch.setattr(scoring_client, "pause_before", pause)
    with pytest.raises(ScoringError, match=reason):
        scorer.scores([sequence, *random_sequences(2)]).result()
    with pytest.raises(ScoringError, match=reason):
        scorer.logprobs([sequence]).result()
    assert sent_again == []
    assert len(good.result()) == 3


def test_a_pickled_client_works_in_another_process(scorer: ServeScorer, folders: Folders) -> None:
    sequences = random_sequences(4)

    @ray.remote(num_cpus=0.1)
    def score(blob: bytes) -> list[float]:
        return pickle.loads(blob).scores(sequences).result()

    np.testing.assert_allclose(ray.get(score.remote(pickle.dumps(scorer))), direct_scores(folders.reward, sequences), atol=1e-5)


@dataclass(frozen=True)
class Call:
    """One call of a client under load."""

    sequences: list[np.ndarray]
    output: str
    answers: list[np.ndarray]
    began: float
    ended: float


@contextmanager
def clients_at_work(folders: Folders, count: int = 8) -> Iterator[list[Call]]:
    """Calls of many clients, for scores and for log-probs, until the block ends. Every one must be answered with what a direct forward
    pass gives, and no attempt be waited for in vain until its deadline."""
    calls: list[Call] = []
    done = threading.Event()
    failures: list[ScoringError] = []
    as_failure = scoring_client.as_failure

    def noted(error: Exception, config: ScoringConfig, deployment: str) -> ScoringError:
        failures.append(as_failure(error, config, deployment))
        return failures[-1]

    def work(number: int) -> None:
        own, seed = connect("scoring", CONFIG), 1000 * number
        while not done.is_set():
            seed += 1
            sequences, output = random_sequences(3, seed=seed), ("scores", "logprobs")[number % 2]
            began = time.monotonic()
            answers = getattr(own, output)(sequences).result()
            calls.append(Call(sequences, output, [np.atleast_1d(answer) for answer in answers], began, time.monotonic()))

    with ThreadPoolExecutor(count) as pool, pytest.MonkeyPatch.context() as patched:
        patched.setattr(scoring_client, "as_failure", noted)
        clients = [pool.submit(work, number) for number in range(count)]
        try:
            wait_until(lambda: len(calls) >= count, "a call of every client", seconds=DEADLINE)
            yield calls
        finally:
            done.set()
        for client in clients:
            client.result()
    assert not [failure for failure in failures if isinstance(failure, ScoringTimeoutError)]
    for call in calls:
        if call.output == "scores":
            direct = [np.atleast_1d(score) for score in direct_scores(folders.reward, call.sequences)]
        else:
            direct = [direct_logprobs(folders, ids) for ids in call.sequences]
        for answer, expected in zip(call.answers, direct, strict=True):
            np.testing.assert_allclose(answer, expected, atol=1e-5)


def test_every_call_is_answered_while_the_only_replica_is_killed(scorer: ServeScorer, folders: Folders) -> None:
    process = scorer.stats()["reference"]["pid"]
    with clients_at_work(folders) as calls:
        os.kill(process, signal.SIGKILL)
        killed = time.monotonic()
        wait_until(
            lambda: any(call.output == "logprobs" and call.began > killed for call in list(calls)),
            "log-probs of a new replica",
            seconds=DEADLINE,
        )
    assert scorer.stats()["reference"]["pid"] != process


def test_the_handle_path_answers_while_the_controller_is_down(scorer: ServeScorer, folders: Folders) -> None:
    def controllers() -> list[int]:
        return [actor.pid for actor in list_actors() if actor.name == "SERVE_CONTROLLER_ACTOR" and actor.state == "ALIVE"]

    (process,) = controllers()
    with clients_at_work(folders) as calls:
        os.kill(process, signal.SIGKILL)
        killed = time.monotonic()
        wait_until(lambda: controllers() not in ([], [process]), "another controller", seconds=DEADLINE, pause=0.2)
        restarted = time.monotonic()
    assert len(controllers()) == 1
    down = [call for call in calls if call.began > killed and call.ended < restarted]
    assert {call.output for call in down} == {"scores", "logprobs"}


def test_many_clients_at_once_get_what_a_direct_forward_pass_gives(scorer: ServeScorer, folders: Folders) -> None:
    def client(number: int) -> float:
        """Largest difference over ten calls of a client of its own."""
        own = connect("scoring", CONFIG.model_copy(update={"hedge_after_seconds": 5.0}))
        worst = 0.0
        for call in range(10):
            sequences = random_sequences(1 + call % 3, seed=1000 * number + call)
            worst = max(worst, np.abs(np.array(own.scores(sequences).result()) - direct_scores(folders.reward, sequences)).max())
        return worst

    with ThreadPoolExecutor(32) as pool:
        assert max(pool.map(client, range(32))) < 1e-5


def test_requests_that_are_computed_alone_repeat_bit_for_bit_under_load(scorer: ServeScorer) -> None:
    alone, sequences = connect("scoring", CONFIG.model_copy(update={"alone": True})), random_sequences(7, seed=3)
    quiet = alone.logprobs(sequences).result()
    for seed in range(4):
        others = scorer.logprobs(random_sequences(20, seed=100 + seed))
        assert all((a == b).all() for a, b in zip(alone.logprobs(sequences).result(), quiet, strict=True))
        others.result()


def test_a_second_attempt_is_sent_where_the_first_takes_long(scorer: ServeScorer, folders: Folders) -> None:
    sequences = random_sequences(4)
    before = scorer.stats()["reference"]["requests"]
    hasty = connect("scoring", CONFIG.model_copy(update={"hedge_after_seconds": 0.001}))
    np.testing.assert_allclose(hasty.logprobs(sequences).result()[0], direct_logprobs(folders, sequences[0]), atol=1e-5)
    assert scorer.stats()["reference"]["requests"] > before


def test_a_deadline_that_passes_is_an_error(scorer: ServeScorer) -> None:
    impatient = connect("scoring", CONFIG.model_copy(update={"timeout_seconds": 0.01, "retries": 1}))
    with pytest.raises(ScoringError, match=r"failed 2 times.*no answer within 0\.01 s"):
        impatient.scores(random_sequences(2)).result()


def test_no_such_service(scorer: ServeScorer) -> None:
    with pytest.raises(ScoringError, match="nowhere"):
        connect("nowhere", CONFIG.model_copy(update={"retries": 0})).scores(random_sequences(1)).result()


def test_start_and_stop_beside_a_running_service(scorer: ServeScorer, folders: Folders, tmp_path: Path) -> None:
    paths = {"reward_paths": [folders.reward], "reference_path": folders.reference, "temperature": 1.0}
    with pytest.raises(ScoringError, match="already runs"), start_scoring(CONFIG, **paths):
        pass
    with (
        pytest.raises(ScoringError, match="one label"),
        start_scoring(CONFIG, **{**paths, "reward_paths": [folders.reference]}, name="wrong"),
    ):
        pass
    greedy = CONFIG.model_copy(update={"reference": WorkersConfig(cpus=1000), "timeout_seconds": 1})
    with pytest.raises(DeadlineError, match="reference"), start_scoring(greedy, **paths, name="greedy", deadline_seconds=1):
        pass
    assert set(serve.status().applications) == {"scoring"}
    assert len(scorer.scores(random_sequences(2)).result()) == 2
