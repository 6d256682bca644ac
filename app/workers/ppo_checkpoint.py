"""The policy in a PPO checkpoint, without starting a learner. Critic and value head stay behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from app.checkpoint import CheckpointStore
from app.config.shared import AdapterConfig
from app.durable import read_json, write_json
from app.errors import CheckpointError
from app.models.adapters import merged_weights, scale_of
from app.run_layout import BASE, MANIFEST, MODEL, SEARCH
from app.workers.deepspeed_engine import saved_weights
from app.workers.pushed_policy import LANGUAGE_MODEL

PPO, POLICY = "ppo", "policy"
ADAPTERS = "adapters.json"


def find_checkpoint(path: Path) -> Path | None:
    """`path` where it is a PPO checkpoint (`DIR/ppo/checkpoints/step-...`), else the newest complete one in it, else None."""
    if (path / POLICY).is_dir():
        return path
    saved = CheckpointStore(path).latest()
    return saved.path if saved and (saved.path / POLICY).is_dir() else None


def describe_adapters(checkpoint: Path, lora: AdapterConfig | None) -> None:
    """Write beside a policy with adapters how they are scaled, which their weights do not say."""
    if lora is not None:
        write_json(checkpoint / POLICY / ADAPTERS, {"scale": scale_of(lora)})


def policy_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The language model's weights under its own names, adapters merged, float32. Raises CheckpointError."""
    saved = saved_weights(checkpoint / POLICY)
    weights = {name.removeprefix(LANGUAGE_MODEL): tensor for name, tensor in saved.items() if name.startswith(LANGUAGE_MODEL)}
    adapters = checkpoint / POLICY / ADAPTERS
    return dict(merged_weights(weights.items(), read_json(adapters)["scale"])) if adapters.is_file() else weights


def starting_policy(checkpoint: Path) -> str:
    """The model that the run of a checkpoint began with, whose config and tokenizer are the policy's. Raises CheckpointError."""
    _, stage, run, *_ = checkpoint.absolute().parents
    if stage.name != PPO and run.name == SEARCH:  # of a trial
        run = run.parent
    for folder in (run / "sft" / MODEL, run / BASE / BASE):
        if folder.is_dir():
            return str(folder)
    if not (run / MANIFEST).is_file():
        raise CheckpointError(f"{checkpoint}: its run folder {run} has no {MANIFEST}; leave checkpoints where the run wrote them")
    config: dict[str, Any] = read_json(run / MANIFEST)["config"]
    return str(config["model"]["path"])
