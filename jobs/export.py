"""`corral export`: a trained model in the shape in which others take it."""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path

from app.errors import ConfigError, CorralError, first_line
from jobs.command import Tool

SIZE = re.compile(r"\d+ ?[KMGT]B", re.IGNORECASE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What, where to, and in which shape."""
    parser.add_argument("model", metavar="MODEL", help="model folder, folder of a peft adapter, or PPO checkpoint")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where it goes: a folder that is not there yet, or empty")
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="what weights are recast to (default: as they are stored)")
    parser.add_argument("--shard-size", default="10GB", metavar="SIZE", help="largest weight file, such as 500MB (default 10GB)")
    parser.add_argument("--drop-heads", action="store_true", help="leave scalar heads out: of a reward model the bare trunk remains")
    parser.add_argument("--push", metavar="NAME", help="upload it to this repository of the Hugging Face hub (made private if it is new)")
    parser.add_argument("--trust-remote-code", action="store_true", help="let the model's repository run its own code while loading")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Load, recast, write; the hub is asked first whether it would take it."""
    if overrides:
        raise ConfigError(f"corral export has no option {overrides[0]}: `corral export --help` lists them")
    if not SIZE.fullmatch(arguments.shard_size):
        raise ConfigError(f"corral export: --shard-size={arguments.shard_size} is no size: write it like 500MB or 10GB")
    import torch
    from transformers.utils import logging

    from app.models.export import Shape, load_for_export, require_free, write_export

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # of weights without a place we tell ourselves
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # saving loads DeepSpeed, which would warn that it found no accelerator
    output = Path(arguments.output).expanduser()
    require_free(output)
    shape = Shape(arguments.dtype, arguments.shard_size, arguments.drop_heads, arguments.trust_remote_code)
    if arguments.push:
        reserve(arguments.push)
    checkpoint = _checkpoint(Path(arguments.model).expanduser())
    if checkpoint is None:
        loaded = load_for_export(arguments.model, shape)
    else:
        from app.workers.ppo_checkpoint import policy_weights, starting_policy

        loaded = load_for_export(starting_policy(checkpoint), shape, lambda: policy_weights(checkpoint))
    files = write_export(loaded, output, shape)
    size = sum(file.stat().st_size for file in files) / 2**20
    sys.stdout.write(f"{output}: {type(loaded.model).__name__}, {loaded.model.dtype}, {size:,.1f} MiB in {len(files)} weight files\n")
    if arguments.push:
        upload(arguments.push, output)
    return 0


def _checkpoint(path: Path) -> Path | None:
    """The PPO checkpoint that is meant, or None for a model."""
    if (path / "config.json").is_file() or not path.is_dir():
        return None
    from app.workers.ppo_checkpoint import find_checkpoint

    return find_checkpoint(path)


def reserve(name: str) -> None:
    """Make the repository unless it is there. Raises ConfigError when the hub cannot be reached or refuses."""
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(name, private=True, exist_ok=True)
    except Exception as error:  # whatever the network or the hub has against it
        raise ConfigError(
            f"--push {name}: the Hugging Face hub does not take it ({first_line(error)}): check the name, the network, and HF_TOKEN "
            "or `hf auth login`; without --push the folder is written all the same"
        ) from error


def upload(name: str, folder: Path) -> None:
    """Send the exported folder. Raises CorralError, with the command that tries again."""
    from huggingface_hub import HfApi

    try:
        address = HfApi().upload_folder(repo_id=name, folder_path=folder, commit_message="Export").commit_url
    except Exception as error:  # as above
        raise CorralError(f"{folder} is written but not uploaded ({first_line(error)}): `hf upload {name} {folder}` tries again") from error
    sys.stdout.write(f"{address}\n")


TOOL = Tool(
    purpose="write a trained model in another precision, split into files, merged with its adapter, or onto the hub",
    details=(
        "Takes what `corral sft`, `rm` and `ppo` leave as DIR/STAGE/model (a reward model keeps its reward_offset), a peft adapter, which\n"
        "is merged into its base, or DIR/ppo/checkpoints (the newest, or one of them; of a trial DIR/tune/TRIAL/checkpoints), of which\n"
        "the policy is taken and the critic left.\n"
        "Writes safetensors, tokenizer, chat template and generation config to a folder that plain transformers loads.\n\n"
        "example:\n  corral export runs/demo/ppo/model --output exported --dtype bf16"
    ),
    add_arguments=add_arguments,
    run=run,
)
