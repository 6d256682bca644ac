"""The environment of a compute process: what has to be set before it starts."""

from __future__ import annotations

from typing import Any

from app.config.shared import WorkersConfig

KEEP_FREED_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
"""For glibc: up to 1 GiB that one step frees serves the next one. By default each large tensor is a new mapping, whose
pages the kernel clears one by one, and so is each large tensor of any thread but the main one, which is where Ray Train computes, unless
all threads share one arena. Huge pages are asked for where the kernel gives them. Measured in docs/results/sft_speed.md and smollm2.md."""

NOTHING_COMPILED = {"TORCHDYNAMO_DISABLE": "1"}
"""On CPUs little of ours gains by torch.compile, but libraries use it in passing: vLLM's sampler would start a C++ compiler for one
comparison at its first token, and DeepSpeed imports all of the compiler (3 s in every process) for an optimizer we do not use."""

COMPILED = {"TORCHDYNAMO_DISABLE": "0"}
"""For a process that compiles all the same."""

NO_GPUS = {"CUDA_VISIBLE_DEVICES": ""}
"""For a process that reserves none: Ray leaves it all GPUs of the node, and DeepSpeed would put its model on the first of them."""

WAITING_YIELDS = {"OMP_WAIT_POLICY": "PASSIVE"}
"""For the learner's processes: threads that wait for their team sleep instead of spinning. Reward model and reference compute at the same
time, on a CPU on the same cores, which spinning threads would keep from them. Measured in docs/results/ppo_speed.md."""


def process_environment(workers: WorkersConfig, **more: str) -> dict[str, str]:
    """Environment variables of one process of a role. Threads are set here because OpenMP reads them at start."""
    on_cpus = {} if workers.gpus else {**NOTHING_COMPILED, **NO_GPUS}
    return {"OMP_NUM_THREADS": str(workers.threads), **KEEP_FREED_MEMORY, **on_cpus, **more}


def process_options(workers: WorkersConfig, **more: str) -> dict[str, Any]:
    """Ray options of one process of a role: its resources and its environment (`more` are further variables)."""
    options = {"num_cpus": workers.cpus, "num_gpus": workers.gpus, "runtime_env": {"env_vars": process_environment(workers, **more)}}
    return {**options, "label_selector": dict(workers.labels)} if workers.labels else options
