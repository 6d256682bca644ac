"""What a push carries, and what an engine makes of it; and what is read out of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from app.config.shared import AdapterConfig
from app.config.training import SftConfig
from app.errors import WeightPushError
from app.models.adapters import is_adapter
from app.models.heads import ValueHead
from app.models.load import load_causal_lm
from app.models.policy import PolicyModel
from app.models.trainable import choose_trainable, merged_state
from app.workers import ppo_checkpoint, pushed_policy
from app.workers.pushed_policy import PolicyOutbox, PushedPolicy
from tests.tiny_models import make_llama, make_neox

LORA = AdapterConfig(rank=4, alpha=6, embeddings=False)


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch) -> dict[int, Any]:
    """In place of Ray's object store: reference -> copies of read-only arrays."""
    held: dict[int, Any] = {}

    def put(bucket: dict[str, Any]) -> int:
        held[len(held)] = {name: array.copy() for name, array in bucket.items()}
        for array in held[len(held) - 1].values():
            array.flags.writeable = False
        return len(held) - 1

    monkeypatch.setattr(
        pushed_policy, "ray", SimpleNamespace(put=put, get=lambda references: [held[reference] for reference in references])
    )
    monkeypatch.setattr(pushed_policy, "BUCKET_BYTES", 2**14)
    return held


def policy_of(folder: str, config: SftConfig) -> PolicyModel:
    model = PolicyModel(load_causal_lm(folder), ValueHead(64, seed=0))  # which no engine is given
    choose_trainable(model.language_model, config, seed=0)
    move(model)
    return model


def move(model: PolicyModel) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)


def outbox_of(model: PolicyModel, *, scale: float | None = None, sends: bool = True) -> PolicyOutbox:
    return PolicyOutbox(cast(Any, SimpleNamespace(module=model, zero_optimization_stage=lambda: 0)), scale=scale, sends=sends)


def received(policy: PushedPolicy) -> dict[str, torch.Tensor]:
    weights = [item for bucket in policy.weights(1) for item in bucket.items()]
    assert len(weights) == len(dict(weights)), "a weight comes twice"
    return {name: torch.from_numpy(array.copy()) for name, array in weights}


def parameters_of(model: PolicyModel) -> dict[str, torch.Tensor]:
    """Of the model without adapters, tied ones once."""
    state = merged_state(model.language_model) or model.language_model.state_dict()
    tied = model.language_model.config.tie_word_embeddings
    return {name: tensor.clone() for name, tensor in state.items() if not (tied and name == "lm_head.weight")}


@pytest.mark.parametrize("make", [make_neox, make_llama])
@pytest.mark.parametrize("config", [SftConfig(), SftConfig(freeze_layers=1), SftConfig(lora=LORA)], ids=["all", "frozen", "lora"])
def test_every_push_gives_an_engine_the_whole_policy_of_now(make: Any, config: SftConfig, tmp_path: Path) -> None:
    model = policy_of(make(tmp_path / "model"), config)
    outbox = outbox_of(model, scale=1.5 if config.lora else None)
    for _ in range(2):
        move(model)
        expected, policy = parameters_of(model), outbox.push()
        merged = dict(outbox.merged())
        assert expected.keys() == merged.keys() == received(policy).keys()
        for name, tensor in received(policy).items():
            assert torch.equal(tensor, merged[name]), name
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)


def test_a_push_of_adapters_carries_nothing_else_after_the_first(tmp_path: Path, store: dict[int, Any]) -> None:
    model = policy_of(make_neox(tmp_path / "model"), SftConfig(lora=LORA))
    whole = sum(tensor.numel() * 4 for tensor in parameters_of(model).values())
    adapters = sum(p.numel() * 4 for name, p in model.named_parameters() if is_adapter(name))
    outbox = outbox_of(model, scale=1.5)
    first = outbox.push()
    before = len(store)
    second = outbox.push()
    assert all(is_adapter(name) for key in range(before, len(store)) for name in store[key])
    assert (first.bytes, second.bytes) == (whole + adapters, adapters)
    assert second.share == adapters / whole < 0.3
    assert second.frozen is first.frozen


def change_a_bit(bucket: dict[str, Any]) -> None:
    name = next(iter(bucket))
    changed = bucket[name].copy()
    changed.view(np.uint8).reshape(-1)[3] ^= 1
    bucket[name] = changed


def cut_a_shape(bucket: dict[str, Any]) -> None:
    name = next(name for name, array in bucket.items() if array.ndim == 2)
    bucket[name] = bucket[name].reshape(-1)


def rename(bucket: dict[str, Any]) -> None:
    bucket["another"] = bucket.pop(next(iter(bucket)))


@pytest.mark.parametrize(
    ("harm", "config", "frozen"),
    [
        (change_a_bit, SftConfig(), False),
        (cut_a_shape, SftConfig(), False),
        (rename, SftConfig(), False),
        (change_a_bit, SftConfig(freeze_layers=1), True),
        (change_a_bit, SftConfig(lora=LORA), False),
        (change_a_bit, SftConfig(lora=LORA), True),
    ],
    ids=["bit", "shape", "name", "frozen", "adapters", "below-adapters"],
)
def test_a_bucket_that_is_not_what_was_sent_is_refused_before_any_is_handed_out(
    harm: Callable[[dict[str, Any]], None], config: SftConfig, frozen: bool, tmp_path: Path, store: dict[int, Any]
) -> None:
    model = policy_of(make_neox(tmp_path / "model"), config)
    outbox = outbox_of(model, scale=1.5 if config.lora else None)
    outbox.push()
    policy: Any = outbox.push()
    received(policy)
    count = len(policy.trained.buckets)
    number, harmed = (count + 1, policy.frozen.buckets[0]) if frozen else (1, policy.trained.buckets[0])
    harm(store[harmed])
    whole = count + len(policy.frozen.buckets)
    with pytest.raises(WeightPushError, match=rf"^policy version 7: bucket {number} of {whole} \(.*\) is not what the learner has sent"):
        policy.weights(7)


def test_what_is_frozen_travels_once_and_all_of_an_ordinary_policy_each_time(tmp_path: Path) -> None:
    folder = make_neox(tmp_path / "model")
    ordinary, upper = (outbox_of(policy_of(folder, SftConfig(freeze_layers=count))) for count in (0, 1))
    assert [ordinary.push().share, ordinary.push().share] == [1.0, 1.0]
    assert upper.push().share == 1.0
    assert 0.2 < upper.push().share < 0.8


def test_the_other_ranks_gather_and_send_nothing(tmp_path: Path, store: dict[int, Any]) -> None:
    policy = outbox_of(policy_of(make_neox(tmp_path / "model"), SftConfig()), sends=False).push()
    assert not store and not policy.trained.buckets


def test_a_checkpoint_says_how_its_adapters_are_scaled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = policy_of(make_neox(tmp_path / "model"), SftConfig(lora=LORA))
    (tmp_path / "policy").mkdir()
    ppo_checkpoint.describe_adapters(tmp_path, LORA)
    monkeypatch.setattr(ppo_checkpoint, "saved_weights", lambda folder: dict(model.named_parameters()))
    weights = ppo_checkpoint.policy_weights(tmp_path)
    expected = parameters_of(model)
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)
