"""What a plan says of what does not fit, and what would help."""

from __future__ import annotations

import math
from collections.abc import Sequence

from app.config.ppo import PpoConfig
from app.config.recipe import Recipe
from app.config.training import TrainingConfig
from app.planning.devices import Device
from app.planning.hardware import Cluster
from app.planning.memory import GIB, Parts, total
from app.planning.placement import StagePlacement
from app.planning.roles import Role

LARGER_GPUS = "take GPUs with more memory or a smaller model"


def fullest(devices: Sequence[Device]) -> list[Device]:
    """Of the GPUs, and of the hosts, that do not fit, the fullest; the others are like it."""
    full = [device for device in devices if not device.fits]
    kinds = {"GPU" in device.name: device for device in sorted(full, key=lambda device: device.used)}
    return list(kinds.values())


def small_engines(recipe: Recipe, stage: StagePlacement, cluster: Cluster) -> list[str]:
    """vLLM refuses to start where its share of a GPU holds no weights, workspace and one sequence."""
    if cluster.gpu is None:
        return []
    texts = []
    for role in stage.roles:
        key, share = _share(recipe, role)
        given = share * cluster.gpu.memory
        if role.gpus and total(role.working) > given:
            texts.append(
                f"stage {stage.name}: {role.name} needs {total(role.working) / GIB:.1f} GiB of a GPU ({_shown(role.working)}), and "
                f"{key} = {share:g} of {cluster.gpu.name} gives it {given / GIB:.1f} GiB: "
                f"raise it, or {role.key}.gpus, or take GPUs with more memory"
            )
    return texts


def _share(recipe: Recipe, role: Role) -> tuple[str, float]:
    """The key that says how much of a GPU an engine may use, and its value; infinite for what is no engine."""
    if role.turn != "rollout":
        return "", math.inf
    if role.key == "rollout.engines":
        return "rollout.gpu_memory_utilization", recipe.rollout.gpu_memory_utilization
    return f"{role.key.removesuffix('workers')}gpu_memory_utilization", recipe.serving.chat[role.name].gpu_memory_utilization


def shortage(recipe: Recipe, stage: StagePlacement, device: Device) -> str:
    roles = {role.name: role for role in stage.roles}
    largest = max(device.parts, key=lambda name: total(device.parts[name]))
    part = max(device.parts[largest], key=lambda name: device.parts[largest][name])
    held = "; ".join(f"{name} {_shown(parts)}" for name, parts in device.parts.items())
    remedy = "take nodes with more memory, or fewer processes on each"
    if "GPU" in device.name and largest in roles:
        remedy = _remedy(recipe, roles[largest], part)
    return f"stage {stage.name}: {device.name} would hold {device.used / GIB:.1f} of {device.capacity / GIB:.1f} GiB ({held}): {remedy}"


def _shown(parts: Parts) -> str:
    return ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items() if size >= 0.05 * GIB) or "little"


def _remedy(recipe: Recipe, role: Role, part: str) -> str:
    """What would lower the largest part of a role on a GPU; only what the recipe has not done yet."""
    if role.turn == "training":
        section = role.key.split(".", maxsplit=1)[0]
        return _remedy_in_training(section, recipe.ppo if section == "ppo" else recipe.sft if section == "sft" else recipe.rm, part)
    if role.turn == "rollout":
        return f"lower {_share(recipe, role)[0]}" if part == "kv_cache" else f"raise {role.key}.gpus, or {LARGER_GPUS}"
    batches = "scoring" if role.key.startswith("scoring.") else role.key.removesuffix("workers") + "batching"
    if part in ("activations", "logits"):
        return f"lower {batches}.max_batch_tokens"
    return f"set {role.key}.gpus = 1, or {LARGER_GPUS}" if role.gpus < 1 else LARGER_GPUS


def _remedy_in_training(section: str, config: TrainingConfig | PpoConfig, part: str) -> str:
    ds, key = config.deepspeed, f"{section}.deepspeed"
    shorter = "rollout.max_new_tokens" if section == "ppo" else "data.max_length"
    batch = f"{section}.micro_batch_tokens" if config.micro_batch_tokens else f"{section}.micro_batch_size"
    smaller = f"lower {batch}" if config.micro_batch_tokens or config.micro_batch_size > 1 else f"lower {shorter}"
    reuses = isinstance(config, PpoConfig) and config.reuse_forward
    remedies = {
        "activations": [
            "" if ds.gradient_checkpointing else f"set {key}.gradient_checkpointing = true",
            "set ppo.reuse_forward = false" if reuses else smaller,
        ],
        "logits": ["set ppo.reuse_forward = false" if reuses else smaller],
        "optimizer": ["add workers", "" if ds.offload_optimizer else f"set {key}.offload_optimizer = true"],
        "gradients": ["" if ds.zero_stage >= 2 else f"set {key}.zero_stage = 2", "add workers"],
        "buffers": [
            f"lower zero_optimization.reduce_bucket_size {'or stage3_max_live_parameters ' if ds.zero_stage == 3 else ''}in {key}.extra"
        ],
    }
    weights = ["add workers" if ds.zero_stage == 3 else "" if reuses else f"set {key}.zero_stage = 3", LARGER_GPUS]
    return ", or ".join(text for text in remedies.get(part, weights) if text)
