"""DeepSpeed's JSON and the learning-rate schedule, from the recipe's sections."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError

from app.config.deepspeed_presets import PRESETS, Preset
from app.config.shared import DeepSpeedConfig, OptimizerConfig
from app.errors import CheckpointError, ConfigError
from app.workers.deepspeed_engine import apply_settings, deepspeed_config, load_engine, lr_factor

OPTIMIZER = OptimizerConfig(max_grad_norm=2.0)


def build(ds: DeepSpeedConfig, precision: str = "fp32") -> dict[str, object]:
    return deepspeed_config(ds, OPTIMIZER, precision=precision, micro_batch_size=4, accumulation=3)


def test_batches_clipping_and_stage() -> None:
    config = build(DeepSpeedConfig(zero_stage=2))
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["gradient_accumulation_steps"] == 3
    assert config["gradient_clipping"] == 2.0
    assert config["zero_optimization"] == {"stage": 2}
    assert "bf16" not in config
    assert "fp16" not in config


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_precision_switches_on_one_section(precision: str) -> None:
    config = build(DeepSpeedConfig(zero_stage=1), precision)
    assert config[precision] == {"enabled": True}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_stage_0_refuses_16_bits(precision: str) -> None:
    with pytest.raises(ConfigError, match="zero_stage = 1"):
        build(DeepSpeedConfig(zero_stage=0), precision)


@pytest.mark.parametrize(
    ("ds", "precision", "stage"),
    [
        (DeepSpeedConfig(zero_stage=0), "fp32", 0),
        (DeepSpeedConfig(zero_stage=1), "fp32", 0),
        (DeepSpeedConfig(preset="zero2"), "fp32", 0),
        (DeepSpeedConfig(zero_stage=1), "bf16", 1),
        (DeepSpeedConfig(preset="zero2_offload"), "fp32", 2),
        (DeepSpeedConfig(zero_stage=3), "fp32", 3),
    ],
)
def test_a_lone_worker_shards_nothing_where_sharding_alone_is_what_zero_does(ds: DeepSpeedConfig, precision: str, stage: int) -> None:
    assert ds.in_effect(precision, workers=1) == ds.model_copy(update={"zero_stage": stage})
    assert ds.in_effect(precision, workers=2) == ds


def test_offload() -> None:
    config = build(DeepSpeedConfig(zero_stage=3, offload_optimizer=True, offload_parameters=True))
    assert config["zero_optimization"] == {"stage": 3, **OFFLOAD}


LIVE = {"sub_group_size": 10**9, "stage3_max_live_parameters": 10**9, "stage3_max_reuse_distance": 10**9, "overlap_comm": True}
CONTIGUOUS = {"contiguous_gradients": True}
ON_HOST = {"device": "cpu", "pin_memory": True}
OFFLOAD = {"offload_optimizer": ON_HOST, "offload_param": ON_HOST}


def buckets(elements: int, overlap_comm: bool) -> dict[str, object]:
    return {"allgather_bucket_size": elements, "reduce_bucket_size": elements, "overlap_comm": overlap_comm, **CONTIGUOUS}


@pytest.mark.parametrize(
    ("preset", "zero"),
    [
        ("zero2", {"stage": 2, **buckets(10**9, False)}),
        ("zero2_offload", {"stage": 2, "offload_optimizer": ON_HOST, **buckets(2 * 10**8, False)}),
        ("zero3", {"stage": 3, **LIVE, **CONTIGUOUS}),
        ("zero3_offload", {"stage": 3, **LIVE, **CONTIGUOUS, **OFFLOAD}),
        ("zero3_offload_65b", {"stage": 3, **{k: v if v is True else 2 * v for k, v in LIVE.items()}, **CONTIGUOUS, **OFFLOAD}),
        ("zero3_offload_rl", {"stage": 3, **buckets(10**9, True), **OFFLOAD}),
    ],
)
def test_presets(preset: str, zero: dict[str, object]) -> None:
    ds = DeepSpeedConfig.model_validate({"preset": preset})
    assert build(ds)["zero_optimization"] == zero
    assert DeepSpeedConfig.model_validate(ds.model_dump()) == ds, "a resolved recipe reads back as itself"


def test_every_preset_is_tested() -> None:
    tested = {case[0] for mark in test_presets.pytestmark for case in mark.args[1]}  # type: ignore[attr-defined]
    assert tested == set(PRESETS) == set(get_args(Preset))


def test_keys_beside_a_preset_win() -> None:
    extra = {"zero_optimization": {"reduce_bucket_size": 1000, "offload_optimizer": {"pin_memory": False}}, "wall_clock_breakdown": True}
    given = {"preset": "zero3_offload", "offload_parameters": False, "gradient_checkpointing": True, "extra": extra}
    config = build(DeepSpeedConfig.model_validate(given))
    expected = {"stage": 3, **LIVE, **CONTIGUOUS, "reduce_bucket_size": 1000, "offload_optimizer": {"device": "cpu", "pin_memory": False}}
    assert config["zero_optimization"] == expected
    assert config["wall_clock_breakdown"] is True


def test_an_unknown_preset_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValidationError, match=r"preset\n.*'zero2', 'zero2_offload', 'zero3'"):
        DeepSpeedConfig.model_validate({"preset": "zero9"})


def test_extra_keys_are_merged_last_and_section_by_section() -> None:
    extra = {"zero_optimization": {"reduce_bucket_size": 1000}, "gradient_clipping": 7.0, "wall_clock_breakdown": True}
    config = build(DeepSpeedConfig(zero_stage=2, extra=extra))
    assert config["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 1000}
    assert config["gradient_clipping"] == 7.0
    assert config["wall_clock_breakdown"] is True


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]),
        ("cosine", [0.5, 1.0, 1.0, 0.853553, 0.5, 0.146447, 0.0]),
    ],
)
def test_learning_rate_by_hand(schedule: str, expected: list[float]) -> None:
    factor = lr_factor(OptimizerConfig(schedule=schedule, warmup_steps=2), total_steps=6)
    assert [factor(step) for step in range(7)] == pytest.approx(expected, abs=1e-6)


def test_learning_rate_without_warmup_starts_at_its_peak_and_stays_at_zero_behind_the_end() -> None:
    factor = lr_factor(OptimizerConfig(schedule="linear"), total_steps=4)
    assert [factor(0), factor(4), factor(9)] == [1.0, 0.0, 0.0]


def test_warmup_longer_than_the_run_only_rises() -> None:
    factor = lr_factor(OptimizerConfig(schedule="cosine", warmup_steps=10), total_steps=4)
    assert [factor(step) for step in range(4)] == pytest.approx([0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize("workers", [1, 3])
def test_a_checkpoint_of_another_number_of_workers_is_refused_before_deepspeed_reads_it(workers: int, tmp_path: Path) -> None:
    for rank in range(2):
        (tmp_path / f"random-{rank:05d}.pt").touch()
    with pytest.raises(CheckpointError, match=f"no complete DeepSpeed checkpoint for {workers} workers"):
        load_engine(SimpleNamespace(dp_world_size=workers, global_rank=0), tmp_path)


def torch_engine(optimizer: OptimizerConfig) -> Any:
    """What `apply_settings` needs of an engine."""
    settings = {name: getattr(optimizer, name) for name in ("lr", "betas", "eps", "weight_decay")}
    adamw = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], **settings)
    return SimpleNamespace(optimizer=adamw, lr_scheduler=torch.optim.lr_scheduler.LambdaLR(adamw, lr_factor(optimizer, 10)))


def loaded(optimizer: OptimizerConfig, written_under: OptimizerConfig) -> Any:
    before = torch_engine(written_under)
    for _ in range(3):
        before.optimizer.step()
        before.lr_scheduler.step()
    after = torch_engine(optimizer)
    after.optimizer.load_state_dict(before.optimizer.state_dict())
    after.lr_scheduler.load_state_dict(before.lr_scheduler.state_dict())
    apply_settings(after, optimizer)
    return before, after


def test_a_checkpoint_goes_on_under_the_learning_rate_of_whoever_loads_it() -> None:
    old, new = OptimizerConfig(lr=1e-3, schedule="linear"), OptimizerConfig(lr=5e-3, schedule="linear", betas=(0.8, 0.9))
    _, copy = loaded(new, old)
    assert copy.optimizer.param_groups[0]["lr"] == pytest.approx(5e-3 * 0.7)
    assert copy.optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    copy.optimizer.step()
    copy.lr_scheduler.step()
    assert copy.optimizer.param_groups[0]["lr"] == pytest.approx(5e-3 * 0.6)


def test_under_the_same_settings_a_loaded_optimizer_is_the_saved_one_bit_for_bit() -> None:
    config = OptimizerConfig(lr=3e-4, schedule="cosine", warmup_steps=2)
    before, after = loaded(config, config)
    assert after.optimizer.state_dict()["param_groups"] == before.optimizer.state_dict()["param_groups"]
    assert after.lr_scheduler.state_dict() == before.lr_scheduler.state_dict()


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_stage_of_zero_stands_in_one_place(stage: int) -> None:
    """What follows from it, such as that ZeRO 3 cannot reuse forward passes, is checked and planned by zero_stage."""
    with pytest.raises(ValidationError, match=rf"stage = {stage} contradicts deepspeed\.zero_stage = 1: leave the former out"):
        DeepSpeedConfig(extra={"zero_optimization": {"stage": stage}})
    assert build(DeepSpeedConfig(extra={"zero_optimization": {"stage": 1}}))["zero_optimization"] == {"stage": 1}
