"""DeepSpeed's JSON and the learning-rate schedule, from the recipe's sections."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from app.config.shared import DeepSpeedConfig, OptimizerConfig
from app.errors import ConfigError
from app.workers.deepspeed_engine import deepspeed_config, lr_factor
from tests.tiny_models import make_neox

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


def test_offload() -> None:
    config = build(DeepSpeedConfig(zero_stage=3, offload_optimizer=True, offload_parameters=True))
    assert config["zero_optimization"] == {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}


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


START_ENGINE = """
import os, sys
import torch
from app.config.shared import DeepSpeedConfig, OptimizerConfig
from app.models.load import load_causal_lm
from app.models.residual_dropout import add_residual_dropout
from app.tasks.sft import TargetLoss
from app.workers.deepspeed_engine import import_deepspeed, start_engine

os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
deepspeed = import_deepspeed()
deepspeed.init_distributed(dist_backend="gloo", verbose=False)
model = load_causal_lm(sys.argv[1])
add_residual_dropout(model, 0.5)
ds = DeepSpeedConfig(gradient_checkpointing=True)
engine = start_engine(TargetLoss(model), OptimizerConfig(), ds, precision="fp32", micro_batch_size=1, accumulation=1, total_steps=1)

computed = []
model.base_model.layers[0].mlp.register_forward_pre_hook(lambda *call: computed.append(1))
ids = torch.arange(4, 20)[None]
def loss(): return engine(ids, torch.arange(16)[None], torch.ones(1, 16, dtype=torch.bool))
first, second = loss(), loss()
assert not torch.equal(first, second), "nothing drops out"
assert len(computed) == 2
engine.backward(first)
assert len(computed) == 3, "activations are not recomputed"
engine.eval()
assert torch.equal(loss(), loss())
"""


def test_an_engine_starts_in_training_mode(tmp_path: Path) -> None:
    """Models are loaded in evaluation mode, in which transformers neither drops out nor recomputes activations."""
    folder = make_neox(tmp_path / "model")
    done = subprocess.run([sys.executable, "-c", START_ENGINE, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
