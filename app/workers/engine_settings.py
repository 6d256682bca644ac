"""What vLLM engines are told beside their model, whoever runs them: rollouts and chat."""

from __future__ import annotations

from typing import Any

from app.config.rollout import RolloutConfig
from app.errors import RolloutError
from app.workers.processes import COMPILED, process_options

BATCHED_TOKENS = 8192
"""Prompt tokens that a CPU engine processes at a time, and at least one whole prompt."""

CPU_BLOCK = 32
"""Tokens of a block of a CPU engine's KV cache, the fewest that its attention takes: samples of one prompt share whole blocks of it."""

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""What vLLM calls a precision."""

ENGINE_VARIABLES = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}
"""The environment that vLLM reads while it is imported."""


def gpu_settings(config: RolloutConfig) -> dict[str, Any]:
    """What an engine on GPUs is told beside its model.

    No step is computed ahead of the one that is handed out, which is vLLM's default there: new weights and sleep come between two steps,
    and its tokens would be of the old weights under the new version. (On CPUs vLLM never does.)
    """
    return {"gpu_memory_utilization": config.gpu_memory_utilization, "async_scheduling": False}


def cpu_settings(kv_cache_gib: float, max_model_len: int) -> dict[str, Any]:
    """What an engine on CPUs is told beside its model.

    Prompts are never processed in pieces: for a piece the engine draws a token, discards it and winds the request's random
    generator back, which torch's CPU generators cannot do.
    """
    return {
        "block_size": CPU_BLOCK,
        "kv_cache_memory_bytes": int(kv_cache_gib * 2**30),
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(BATCHED_TOKENS, max_model_len),
    }


def require_compiler() -> None:
    """Raises RolloutError where this machine has no C++ compiler, which vLLM would say minutes later and less clearly."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise RolloutError(
            "rollout.enforce_eager = false compiles the model, and this machine has no C++ compiler: install g++, or leave the key out"
        ) from None


def engine_options(config: RolloutConfig, placement: Any) -> dict[str, Any]:
    """Ray actor options of one engine: its resources and the environment that vLLM reads while it is imported."""
    compiler = COMPILED if config.compiles else {}
    variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", **ENGINE_VARIABLES, **compiler}
    return process_options(config.engines, **variables) | {"scheduling_strategy": placement}
