"""The reward-model loss: what the replies of a group share is computed once, and nothing else changes by it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from app.config.training import RewardModelConfig
from app.data.token_cache import GroupRow
from app.models.heads import load_reward_model
from app.tasks.reward_model import RewardModelTask, SequenceScores
from tests.tiny_models import END, VOCABULARY, make_llama, make_neox, make_tokenizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=[make_neox, make_llama], ids=["neox", "llama"])
def sft_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(request.param(tmp_path_factory.mktemp("sft")))


def groups() -> list[GroupRow]:
    generator = np.random.default_rng(0)
    end = make_tokenizer().convert_tokens_to_ids(END)

    def draw(length: int) -> list[int]:
        return [int(i) for i in generator.integers(4, VOCABULARY, length)]

    rows = []
    for number, lengths in enumerate(((3, 40), (11, 2, 25), (6, 6, 1, 30))):
        prompt = draw(10 * number + 5)
        rows.append(GroupRow(str(number), tuple(np.array([*prompt, *draw(n), end], np.int32) for n in lengths)))
    return rows


def task(sft_path: str, *, share_prefix: bool | None) -> RewardModelTask:
    return RewardModelTask(Path(), sft_path, 0, False, RewardModelConfig(share_prefix=share_prefix))


def test_loss_gradients_and_metrics_do_not_depend_on_sharing(sft_path: str) -> None:
    shared, plain = task(sft_path, share_prefix=True), task(sft_path, share_prefix=False)
    model, reference = shared.build_model(), plain.build_model()
    assert isinstance(model, SequenceScores) and isinstance(reference, SequenceScores)
    assert model.sharing and not reference.sharing
    loss, expected = shared.loss(model, groups(), CPU), plain.loss(reference, groups(), CPU)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    loss.backward()
    expected.backward()
    for (name, parameter), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
    with torch.no_grad():
        metrics, wanted = shared.evaluate(model, groups(), CPU), plain.evaluate(reference, groups(), CPU)
    assert metrics == pytest.approx(wanted, abs=1e-4)


def test_micro_batches_add_up(sft_path: str) -> None:
    job = task(sft_path, share_prefix=True)
    model = job.build_model()
    parts = sum(job.loss(model, [row], CPU) for row in groups())
    torch.testing.assert_close(job.loss(model, groups(), CPU), parts, atol=1e-5, rtol=0)


def test_the_exported_model_scores_alike(sft_path: str, tmp_path: Path) -> None:
    job = task(sft_path, share_prefix=None)
    model = job.build_model()
    assert isinstance(model, SequenceScores)
    job.export(model, tmp_path / "model")
    exported = SequenceScores(load_reward_model(str(tmp_path / "model")), sharing=False)
    with torch.no_grad():
        torch.testing.assert_close(job.loss(model, groups(), CPU), job.loss(exported, groups(), CPU), atol=1e-5, rtol=0)
