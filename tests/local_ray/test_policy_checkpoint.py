"""One engine of a learner in a process of its own: how it starts, and what can be read of what it saves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from app.errors import CheckpointError
from app.workers.ppo_checkpoint import policy_weights, starting_policy
from jobs.main import main
from tests.tiny_models import make_neox

START_ENGINE = """
import os, sys
from pathlib import Path
import torch
from app.config.shared import DeepSpeedConfig, OptimizerConfig
from app.models.load import load_causal_lm
from app.models.residual_dropout import add_residual_dropout
from app.tasks.sft import TargetLoss
from app.workers.deepspeed_engine import backward_scaled, import_deepspeed, optimizer_step, save_engine, start_engine

os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
deepspeed = import_deepspeed()
deepspeed.init_distributed(dist_backend="gloo", verbose=False)
ids = torch.arange(4, 20)[None]
batch = ids, torch.arange(16)[None], torch.ones(1, 16, dtype=torch.bool)

def start(model, ds):
    # eps: without it Adam makes whole steps of rounding noise where a gradient is 0, as that of a key bias is
    optimizer = OptimizerConfig(lr=1e-2, eps=1e-4, max_grad_norm=0.5)
    return start_engine(TargetLoss(model), optimizer, ds, precision="fp32", micro_batch_size=1, accumulation=1, total_steps=9)

def save(engine, model, folder):
    save_engine(engine, folder / "policy", {})
    torch.save({name: tensor.clone() for name, tensor in model.state_dict().items()}, folder / "expected.pt")

model = load_causal_lm(sys.argv[1])
add_residual_dropout(model, 0.5)
engine = start(model, DeepSpeedConfig(gradient_checkpointing=True))
computed = []
model.base_model.layers[0].mlp.register_forward_pre_hook(lambda *call: computed.append(1))
def loss(): return engine(*batch)
first, second = loss(), loss()
assert not torch.equal(first, second), "nothing drops out"
assert len(computed) == 2
engine.backward(first)
assert len(computed) == 3, "activations are not recomputed"
engine.step()
engine.eval()
assert torch.equal(loss(), loss())
save(engine, model, Path(sys.argv[2]))

def trained(ds):
    model = load_causal_lm(sys.argv[1])
    engine, norms = start(model, ds), []
    for _ in range(3):
        backward_scaled(engine, engine(*batch) / 16)
        norms.append(optimizer_step(engine))
    return engine, model, norms

lone, model, norms = trained(DeepSpeedConfig())
sharded, same, same_norms = trained(DeepSpeedConfig(extra={"zero_optimization": {"stage": 1}}))
assert (lone.zero_optimization_stage(), sharded.zero_optimization_stage()) == (0, 1)
torch.testing.assert_close(norms, same_norms, rtol=1e-5, atol=0)
assert norms[0] > 0.5, "nothing is clipped"
for name, weight in same.state_dict().items():
    torch.testing.assert_close(model.state_dict()[name], weight, rtol=0, atol=1e-6)
save(sharded, same, Path(sys.argv[3]))
"""


def sharded(checkpoint: Path) -> Path:
    """The checkpoint beside it, of an engine with ZeRO 1."""
    return checkpoint.with_name("step-00000003")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the policy's engine of a learner leaves, in the run folder that it would be in, and `expected.pt` with its weights."""
    run = tmp_path_factory.mktemp("run")
    folder = run / "ppo" / "checkpoints" / "step-00000001"
    for made in (folder, sharded(folder)):
        made.mkdir(parents=True)
    command = [sys.executable, "-c", START_ENGINE, make_neox(run / "sft" / "model"), str(folder), str(sharded(folder))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def test_an_engine_starts_in_training_mode(checkpoint: Path) -> None:
    """Models are loaded in evaluation mode, in which transformers neither drops out nor recomputes activations: see START_ENGINE."""
    assert (checkpoint / "expected.pt").is_file()


def test_a_lone_worker_trains_without_zero_as_with_it(checkpoint: Path) -> None:
    """Weights and gradient norms of three clipped steps: see START_ENGINE."""
    assert (sharded(checkpoint) / "expected.pt").is_file()


def test_the_weights_of_a_checkpoint_are_read_without_its_workers(checkpoint: Path, tmp_path: Path) -> None:
    for folder in (checkpoint, sharded(checkpoint)):
        expected = torch.load(folder / "expected.pt")
        weights = policy_weights(folder)
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    with pytest.raises(CheckpointError, match="holds no DeepSpeed checkpoint"):
        policy_weights(tmp_path)


def test_a_ppo_checkpoint_is_exported_with_the_tokenizer_of_its_run(checkpoint: Path, tmp_path: Path) -> None:
    assert main(["export", str(checkpoint), "--output", str(tmp_path / "out")]) == 0
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    expected = torch.load(checkpoint / "expected.pt")
    assert all(torch.equal(exported[name], tensor) for name, tensor in expected.items())
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert starting_policy(checkpoint) == str(checkpoint.parents[2] / "sft" / "model")
