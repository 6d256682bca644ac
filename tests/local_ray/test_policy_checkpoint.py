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
from app.workers.deepspeed_engine import import_deepspeed, save_engine, start_engine

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
engine.step()
engine.eval()
assert torch.equal(loss(), loss())
save_engine(engine, Path(sys.argv[2]) / "policy", {})
torch.save({name: tensor.clone() for name, tensor in model.state_dict().items()}, Path(sys.argv[2]) / "expected.pt")
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the policy's engine of a learner leaves, in the run folder that it would be in, and `expected.pt` with its weights."""
    run = tmp_path_factory.mktemp("run")
    folder = run / "ppo" / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    command = [sys.executable, "-c", START_ENGINE, make_neox(run / "sft" / "model"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def test_an_engine_starts_in_training_mode(checkpoint: Path) -> None:
    """Models are loaded in evaluation mode, in which transformers neither drops out nor recomputes activations: see START_ENGINE."""
    assert (checkpoint / "expected.pt").is_file()


def test_the_weights_of_a_checkpoint_are_read_without_its_workers(checkpoint: Path, tmp_path: Path) -> None:
    expected = torch.load(checkpoint / "expected.pt")
    weights = policy_weights(checkpoint)
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
