"""Adapters by the names of their weights alone."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from peft.tuners.lora import LoraLayer

from app.config.shared import AdapterConfig
from app.config.training import SftConfig
from app.errors import ModelError
from app.models.adapters import is_adapter, merged_weights, scale_of
from app.models.load import load_causal_lm
from app.models.trainable import check_trainable, choose_trainable
from tests.tiny_models import make_neox

OWNER = "layers.0.query"
PARTS = {
    f"{OWNER}.base_layer.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]),
    f"{OWNER}.lora_A.default.weight": torch.tensor([[1.0, -1.0]]),
    f"{OWNER}.lora_B.default.weight": torch.tensor([[1.0], [0.0], [2.0]]),
}
OTHERS = {f"{OWNER}.base_layer.bias": torch.ones(3), "norm.weight": torch.zeros(2)}


def test_each_adapter_is_added_to_its_own_weight_in_whatever_order_they_come() -> None:
    for order in itertools.permutations({**PARTS, **OTHERS}.items()):
        merged = dict(merged_weights(order, 0.5))
        assert merged.keys() == {f"{OWNER}.weight", f"{OWNER}.bias", "norm.weight"}
        assert merged[f"{OWNER}.weight"].tolist() == [[1.5, 1.5], [3.0, 4.0], [6.0, 5.0]]


def test_a_sum_of_half_precision_is_rounded_once() -> None:
    parts = {name: tensor.bfloat16() / 3 for name, tensor in PARTS.items()}
    base, low, high = (tensor.double() for tensor in parts.values())
    (merged,) = dict(merged_weights(parts.items(), 0.5)).values()
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, (base + 0.5 * high @ low).bfloat16())


@pytest.mark.parametrize("lost", PARTS)
def test_an_adapter_without_all_its_parts_is_refused(lost: str) -> None:
    with pytest.raises(ModelError, match=rf"{OWNER}: its adapter lacks \.{lost.removeprefix(OWNER)[1:]}"):
        dict(merged_weights([(name, tensor) for name, tensor in PARTS.items() if name != lost], 1.0))


def test_scale_and_names_are_pefts(tmp_path: Path) -> None:
    model = load_causal_lm(make_neox(tmp_path / "model"))
    config = SftConfig(lora=AdapterConfig(rank=4, alpha=6, embeddings=False))
    choose_trainable(model, config, seed=0)
    assert config.lora is not None
    assert {part.scaling["default"] for part in model.modules() if isinstance(part, LoraLayer)} == {scale_of(config.lora)}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if is_adapter(name)} != set()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"freeze_layers": 2}, "freeze_layers = 2 leaves nothing"), ({"lora": {"targets": ["gone"]}}, "there are dense, ")],
)
def test_what_cannot_be_trained_is_refused_before_weights_are_loaded(settings: dict[str, object], reason: str, tmp_path: Path) -> None:
    folder = Path(make_neox(tmp_path / "model"))
    (folder / "model.safetensors").unlink()
    check_trainable(str(folder), SftConfig(freeze_layers=1))
    check_trainable(str(folder), SftConfig(lora=AdapterConfig()))
    with pytest.raises(ModelError, match=reason):
        check_trainable(str(folder), SftConfig.model_validate(settings))
