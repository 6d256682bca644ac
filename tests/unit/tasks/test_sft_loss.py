"""The SFT loss against each thread alone: padding, packing and the head on targets alone change nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, PreTrainedModel

from app.data.collate import collate_threads
from app.data.token_cache import SftRow
from app.tasks.sft import TargetLoss
from tests.tiny_models import VOCABULARY, make_llama, make_neox

LENGTHS = (7, 2, 30, 12, 12, 9, 25)
PACK_TO = 40


def make_gemma(folder: Path) -> str:
    """Its logits are capped behind the head."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        head_dim=16, final_logit_softcapping=5.0, initializer_range=0.2, attn_implementation="eager",
    )  # fmt: skip
    Gemma2ForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=[make_neox, make_llama, make_gemma], ids=["neox", "llama", "gemma"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    folder: Path = tmp_path_factory.mktemp("model")
    return AutoModelForCausalLM.from_pretrained(request.param(folder), dtype=torch.float32).eval()


def threads() -> list[SftRow]:
    generator = np.random.default_rng(0)
    return [
        SftRow(generator.integers(4, VOCABULARY, n).astype(np.int32), np.arange(n) >= max(1, n - int(generator.integers(1, n))))
        for n in LENGTHS
    ]


def gradients(model: PreTrainedModel, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))


def literal_loss(model: PreTrainedModel, row: SftRow) -> torch.Tensor:
    """One thread alone, without padding, from its full logits."""
    ids_S = torch.from_numpy(row.ids.astype(np.int64))
    logprobs_RV = model(ids_S[None]).logits[0, :-1].float().log_softmax(-1)
    return -sum(logprobs_RV[t - 1, ids_S[t]] for t in range(1, len(ids_S)) if row.loss_mask[t])  # type: ignore[return-value]


@pytest.mark.parametrize("pack_to", [None, PACK_TO])
def test_loss_and_gradients_are_those_of_each_thread_alone(model: PreTrainedModel, pack_to: int | None) -> None:
    expected = sum(literal_loss(model, row) for row in threads())
    assert isinstance(expected, torch.Tensor)
    loss = TargetLoss(model)(*collate_threads(threads(), pack_to=pack_to))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    reference = gradients(model, expected)
    largest = max(float(g.abs().max()) for g in reference)
    for actual, wanted in zip(gradients(model, loss), reference, strict=True):
        torch.testing.assert_close(actual, wanted, atol=1e-5 * largest, rtol=0)


def test_poly_loss_is_added_in_training_alone(model: PreTrainedModel) -> None:
    batch = collate_threads(threads())
    plain, poly = TargetLoss(model).eval(), TargetLoss(model, poly_eps=0.5).eval()
    assert poly(*batch) == plain(*batch)
    poly.training = True  # the model itself stays in evaluation mode, where dropout is off
    probabilities = torch.tensor([float((-literal_loss(model, row_of(row, t)).detach()).exp()) for row in threads() for t in targets(row)])
    torch.testing.assert_close(poly(*batch), plain(*batch) + 0.5 * (1 - probabilities).sum(), rtol=1e-5, atol=0)


def targets(row: SftRow) -> list[int]:
    return [t for t in range(1, len(row.ids)) if row.loss_mask[t]]


def row_of(row: SftRow, target: int) -> SftRow:
    """The row with one target only."""
    return SftRow(row.ids, np.arange(len(row.ids)) == target)


def test_a_thread_sees_nothing_of_its_neighbour_in_the_row(model: PreTrainedModel) -> None:
    rows = threads()
    batch = collate_threads(rows, pack_to=PACK_TO)
    assert len(batch.ids_BS) < len(rows), "nothing was packed"
    first = int((batch.positions_BS[0, 1:] == 0).nonzero()[0]) + 1
    ids_BS = batch.ids_BS.clone()
    ids_BS[0, :first] = (ids_BS[0, :first] + 1) % VOCABULARY
    targets_BS = batch.targets_BS.clone()
    targets_BS[0, :first] = False
    loss = TargetLoss(model)
    before = loss(batch.ids_BS, batch.positions_BS, targets_BS)
    torch.testing.assert_close(loss(ids_BS, batch.positions_BS, targets_BS), before, rtol=1e-6, atol=0)
