"""Open-Assistant's DeepSpeed files (model/model_training/configs/*.json) as named values of `DeepSpeedConfig`.

What those files say beyond ZeRO is said elsewhere in a recipe: optimizer and schedule in `optimizer`, precision in `model.precision`
(DeepSpeed's own defaults of the fp16 loss scale are theirs), accumulation by `batch_size`. Their "auto" sizes are DeepSpeed's
defaults here. `stage3_gather_16bit_weights_on_model_save` has no use: models are exported from gathered parameters at any stage.
"""

from __future__ import annotations

from typing import Any, Literal

Preset = Literal["zero2", "zero2_offload", "zero3", "zero3_offload", "zero3_offload_65b", "zero3_offload_rl"]


def _buckets(elements: int, *, overlap_comm: bool) -> dict[str, Any]:
    sizes = {"allgather_bucket_size": elements, "reduce_bucket_size": elements}
    return {**sizes, "overlap_comm": overlap_comm, "contiguous_gradients": True}


def _live(elements: int) -> dict[str, Any]:
    sizes = {"sub_group_size": elements, "stage3_max_live_parameters": elements, "stage3_max_reuse_distance": elements}
    return {**sizes, "overlap_comm": True, "contiguous_gradients": True}


_OFFLOAD_BOTH = {"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True}

PRESETS: dict[Preset, dict[str, Any]] = {
    # zero_config, zero_config_pretrain
    "zero2": {"zero_stage": 2, "extra": {"zero_optimization": _buckets(1_000_000_000, overlap_comm=False)}},
    # deepspeed_rl
    "zero2_offload": {
        "zero_stage": 2,
        "offload_optimizer": True,
        "extra": {"zero_optimization": _buckets(200_000_000, overlap_comm=False)},
    },
    # zero3_config_sft, zero3_config_pretrain
    "zero3": {"zero_stage": 3, "extra": {"zero_optimization": _live(1_000_000_000)}},
    # zero3_config_falcon
    "zero3_offload": {**_OFFLOAD_BOTH, "extra": {"zero_optimization": _live(1_000_000_000)}},
    # zero_config_sft_65b
    "zero3_offload_65b": {**_OFFLOAD_BOTH, "extra": {"zero_optimization": _live(2_000_000_000)}},
    # deepspeed_rl_zero3
    "zero3_offload_rl": {**_OFFLOAD_BOTH, "extra": {"zero_optimization": _buckets(1_000_000_000, overlap_comm=True)}},
}
