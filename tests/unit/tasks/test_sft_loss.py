"""The SFT loss against each thread alone: padding, packing and the head on targets alone change nothing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from app.config.training import SftConfig
from app.data.collate import collate_threads
from app.data.token_cache import SftRow
from app.models.load import load_causal_lm
from app.models.segments import attend_by_segment
from app.tasks.sft import SftTask, TargetLoss
from tests.tiny_models import VOCABULARY, make_llama, make_neox

LENGTHS = (7, 2, 30, 12, 12, 9, 25)
WINDOW = 8


def make_gemma(folder: Path) -> str:
    """Its logits are capped behind the head."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        head_dim=16, final_logit_softcapping=5.0, initializer_range=0.2, attn_implementation="eager",
    )  # fmt: skip
    Gemma2ForCausalLM(config).save_pretrained(folder)
    return str(folder)


def make_mistral(folder: Path) -> str:
    """It sees fewer tokens back than most threads have."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        sliding_window=WINDOW, initializer_range=0.2,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=[make_neox, make_llama, make_mistral, make_gemma], ids=["neox", "llama", "mistral", "gemma"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    made: str = request.param(tmp_path_factory.mktemp("model"))
    return made


def load(folder: str) -> PreTrainedModel:
    model = load_causal_lm(folder)
    if model.config.model_type == "gemma2":
        model.set_attn_implementation("eager")
    return model


@pytest.fixture(scope="module")
def model(folder: str) -> PreTrainedModel:
    """As Transformers computes it."""
    return load(folder)


@pytest.fixture(scope="module")
def target_loss(folder: str) -> TargetLoss:
    return TargetLoss(load(folder)).eval()


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


def task_loss(target_loss: TargetLoss, rows: list[SftRow], *, packing: bool) -> torch.Tensor:
    """What a training step computes; a DeepSpeed engine passes its arguments on to its `module`."""

    class Engine(SimpleNamespace):
        def __call__(self, *batch: torch.Tensor) -> torch.Tensor:
            loss: torch.Tensor = self.module(*batch)
            return loss

    task = SftTask(Path(), "", "fp32", False, SftConfig(packing=packing))
    return task.loss(Engine(module=target_loss), rows, torch.device("cpu"))


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_are_those_of_each_thread_alone(
    model: PreTrainedModel, target_loss: TargetLoss, packing: bool, checkpointing: bool
) -> None:
    expected = sum(literal_loss(model, row) for row in threads())
    assert isinstance(expected, torch.Tensor)
    if checkpointing:
        target_loss.language_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        target_loss.train()
    loss = task_loss(target_loss, threads(), packing=packing)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    reference = gradients(model, expected)
    largest = max(float(g.abs().max()) for g in reference)
    for actual, wanted in zip(gradients(target_loss.language_model, loss), reference, strict=True):
        torch.testing.assert_close(actual, wanted, atol=1e-5 * largest, rtol=0)
    target_loss.language_model.gradient_checkpointing_disable()


@pytest.mark.parametrize("packing", [False, True])
def test_accuracy_is_the_share_of_targets_that_are_likeliest(model: PreTrainedModel, target_loss: TargetLoss, packing: bool) -> None:
    rows, hits, count = [], 0, 0
    for row in threads():
        likeliest = model(torch.from_numpy(row.ids.astype(np.int64))[None]).logits[0].argmax(-1).tolist()
        ids = row.ids.copy()
        for t in targets(row)[::2]:  # every other target becomes what the tokens before it make likeliest
            ids[t] = likeliest[t - 1]
            likeliest = model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0].argmax(-1).tolist()
        rows.append(SftRow(ids, row.loss_mask))
        hits += sum(likeliest[t - 1] == ids[t] for t in targets(row))
        count += len(targets(row))
    task = SftTask(Path(), "", "fp32", False, SftConfig(packing=packing))

    class Engine(SimpleNamespace):
        def __call__(self, *batch: torch.Tensor, **options: bool) -> torch.Tensor:
            found: torch.Tensor = self.module(*batch, **options)
            return found

    engine = Engine(module=target_loss)
    assert 0 < hits < count
    found = task.summarise(task.evaluate(engine, rows, torch.device("cpu")))
    assert found["accuracy"] == hits / count
    assert found["loss"] == pytest.approx(task.loss(engine, rows, torch.device("cpu")).item() / count, rel=1e-6)


def test_poly_loss_is_added_in_training_alone(folder: str, model: PreTrainedModel) -> None:
    batch = collate_threads(threads())
    plain, poly = TargetLoss(load(folder)).eval(), TargetLoss(load(folder), poly_eps=0.5).eval()
    assert poly(*batch) == plain(*batch)
    poly.training = True  # the model itself stays in evaluation mode, where dropout is off
    probabilities = torch.tensor([float((-literal_loss(model, row_of(row, t)).detach()).exp()) for row in threads() for t in targets(row)])
    torch.testing.assert_close(poly(*batch), plain(*batch) + 0.5 * (1 - probabilities).sum(), rtol=1e-5, atol=0)


def targets(row: SftRow) -> list[int]:
    return [t for t in range(1, len(row.ids)) if row.loss_mask[t]]


def row_of(row: SftRow, target: int) -> SftRow:
    """The row with one target only."""
    return SftRow(row.ids, np.arange(len(row.ids)) == target)


def test_a_thread_sees_nothing_of_its_neighbour_in_the_row(target_loss: TargetLoss) -> None:
    """Bit for bit: what stands before or behind a thread is never multiplied with it."""
    rows = threads()
    batch = collate_threads(rows, packed=True)
    if not target_loss.packs:
        pytest.skip("one row per thread")
    first = len(rows[0].ids)
    ids_BS, targets_BS = batch.ids_BS.clone(), batch.targets_BS.clone()
    ids_BS[0, :first] = (ids_BS[0, :first] + 1) % VOCABULARY
    targets_BS[0, :first] = False
    before = target_loss(batch.ids_BS, batch.positions_BS, targets_BS)
    assert target_loss(ids_BS, batch.positions_BS, targets_BS) == before


def test_layers_that_need_more_than_causality_get_one_row_per_thread(folder: str) -> None:
    model = load(folder)
    assert attend_by_segment(model) == (model.config.model_type != "gemma2")
    assert "corral" not in model.config.to_json_string(), "the exported model must not name this attention"
    recurrent = load(folder)
    recurrent.config.layer_types = ["linear_attention", "full_attention"]
    assert not attend_by_segment(recurrent)
