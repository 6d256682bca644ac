"""Rollout engines: vLLM inside Ray actors. Token ids in, token ids and log-probs out."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import ray

from app.config.ppo import RolloutConfig
from app.config.shared import WorkersConfig
from app.errors import RolloutError
from app.experience import FinishReason, FloatArray, IntArray, Prompt, Rollout
from app.workers.pending import Remote, collect
from app.workers.processes import process_options

BATCHED_TOKENS = 8192
"""Prompt tokens that a CPU engine processes at a time, and at least one whole prompt."""

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""What vLLM calls a precision."""

ENGINE_VARIABLES = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}
"""The environment that vLLM reads while it is imported."""

Weights = Mapping[str, np.ndarray[Any, Any]]  # parameter name -> array
Sampled = tuple[IntArray, FloatArray, str]  # response ids [T], log-probs [T], finish reason


def request_seed(seed: int, prompt_id: str, sample: int) -> int:
    """Sampling seed of one response: depends on what is sampled, never on which engine samples it or beside what."""
    digest = hashlib.blake2b(f"{seed}:{prompt_id}:{sample}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


class RolloutEngine:
    """One vLLM engine in the process of a Ray actor.

    The engine core runs in this process, so the weights that a push brings through Ray's object store are handed to it
    as arrays, without a copy on the way.
    """

    def __init__(
        self, model_path: str, config: RolloutConfig, *, precision: str, max_model_len: int, eos_ids: Sequence[int], seed: int
    ) -> None:
        import torch

        threads = config.engines.threads
        torch.set_num_threads(threads)
        from vllm import LLM
        from vllm.config import WeightTransferConfig

        from app.workers.weight_transfer import BACKEND, register_object_store_backend

        register_object_store_backend()
        on_gpu = config.engines.gpus > 0
        tensor_parallel = max(1, int(config.engines.gpus))
        self._llm = LLM(
            model=model_path,
            skip_tokenizer_init=True,
            dtype=DTYPES[precision],
            max_model_len=max_model_len,
            enforce_eager=not on_gpu,
            enable_prefix_caching=False,  # a cached prefix would outlive the weights that computed it
            logprobs_mode="processed_logprobs",  # of the distribution that was sampled from: after temperature
            distributed_executor_backend="uni" if tensor_parallel == 1 else "mp",
            tensor_parallel_size=tensor_parallel,
            weight_transfer_config=WeightTransferConfig(backend="nccl" if uses_nccl(config) else BACKEND),
            enable_sleep_mode=config.colocate and on_gpu,
            seed=seed % 2**31,
            **(gpu_settings(config) if on_gpu else cpu_settings(config.kv_cache_gib, max_model_len)),
        )
        self._config = config
        self._eos_ids = list(eos_ids)
        self._sleeps = config.colocate and on_gpu
        self.version = 0

    def generate(self, prompts: Sequence[IntArray], seeds: Sequence[int]) -> tuple[int, list[Sampled]]:
        """Sample one response per prompt. Returns the policy version and, in the order of `prompts`, what was sampled."""
        common = {"max_tokens": self._config.max_new_tokens, "temperature": self._config.temperature, "logprobs": 0}
        return self.version, [_sampled(output) for output in self._respond(prompts, [{**common, "seed": seed} for seed in seeds])]

    def sample(self, prompts: Sequence[IntArray], settings: Sequence[Mapping[str, Any]]) -> list[IntArray]:
        """Sample one response per prompt, each under vLLM sampling settings of its own. Returns token ids, in the order of `prompts`."""
        return [np.asarray(output.token_ids, dtype=np.int32) for output in self._respond(prompts, settings)]

    def _respond(self, prompts: Sequence[IntArray], settings: Sequence[Mapping[str, Any]]) -> list[Any]:
        from vllm import SamplingParams, TokensPrompt

        ending = {
            "detokenize": False,
            "stop_token_ids": None if self._config.ignore_eos else self._eos_ids,
            "ignore_eos": True,  # the end tokens are given above; no second source of truth
        }
        with self._awake():
            outputs = self._llm.generate(
                [TokensPrompt(prompt_token_ids=prompt.tolist()) for prompt in prompts],
                [SamplingParams(**ending, **one) for one in settings],
                use_tqdm=False,
            )
        return [output.outputs[0] for output in outputs]

    def logprobs(self, sequences: Sequence[IntArray]) -> list[FloatArray]:
        """Log-probs [S-1] of given sequences under the current weights, at temperature 1."""
        from vllm import SamplingParams, TokensPrompt

        with self._awake():
            outputs = self._llm.generate(
                [TokensPrompt(prompt_token_ids=ids.tolist()) for ids in sequences],
                SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False, ignore_eos=True),
                use_tqdm=False,
            )
        rows = []
        for ids, output in zip(sequences, outputs, strict=True):
            steps = output.prompt_logprobs[1:]  # the first token has no distribution before it
            rows.append(np.array([step[int(token)].logprob for step, token in zip(steps, ids[1:], strict=True)], dtype=np.float32))
        return rows

    def transfer(self, method: str, *args: Any) -> None:
        """Call one step of vLLM's weight-transfer interface on the workers of this engine."""
        self._llm.collective_rpc(method, args=args)

    def load_buckets(self, buckets: Sequence[ray.ObjectRef[Weights]], version: int) -> None:
        """Replace all weights by the given buckets; answers from here on carry `version`."""
        self._load(map(ray.get, buckets), version)

    def load_folder(self, path: str, version: int) -> None:
        """Replace all weights by those of a Hugging Face folder of the same architecture. Needs rollout.transfer = object_store."""
        from safetensors.torch import load_file

        files = sorted(Path(path).glob("*.safetensors"))
        self._load(({name: tensor.float().numpy() for name, tensor in load_file(file).items()} for file in files), version)

    def _load(self, buckets: Iterable[Weights], version: int) -> None:
        with self._awake():
            self.transfer("start_weight_update")
            for tensors in buckets:
                self.transfer("update_weights", {"tensors": tensors})
            self.transfer("finish_weight_update")
        self.version = version

    def set_version(self, version: int) -> None:
        """Label the weights that another backend has just brought."""
        self.version = version

    @contextmanager
    def _awake(self) -> Iterator[None]:
        """On a shared GPU the engine gives its memory back between calls."""
        if self._sleeps and self._llm.llm_engine.is_sleeping():
            self._llm.wake_up()
        yield
        if self._sleeps:
            self._llm.sleep(level=1)

    def pid(self) -> int:
        import os

        return os.getpid()


def gpu_settings(config: RolloutConfig) -> dict[str, Any]:
    """What an engine on GPUs is told beside its model."""
    return {"gpu_memory_utilization": config.gpu_memory_utilization}


def cpu_settings(kv_cache_gib: float, max_model_len: int) -> dict[str, Any]:
    """What an engine on CPUs is told beside its model.

    Prompts are never processed in pieces: for a piece the engine draws a token, discards it and winds the request's random
    generator back, which torch's CPU generators cannot do.
    """
    return {
        "kv_cache_memory_bytes": int(kv_cache_gib * 2**30),
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(BATCHED_TOKENS, max_model_len),
    }


def uses_nccl(config: RolloutConfig) -> bool:
    """NCCL needs engines that own their GPUs: two processes of one NCCL group cannot share one."""
    if config.transfer == "auto":
        return config.engines.gpus > 0 and not config.colocate
    return config.transfer == "nccl"


def _sampled(output: Any) -> Sampled:
    ids = np.asarray(output.token_ids, dtype=np.int32)
    logprobs = np.array([step[int(token)].logprob for step, token in zip(output.logprobs, ids, strict=True)], dtype=np.float32)
    return ids, logprobs, str(output.finish_reason)


def engine_options(workers: WorkersConfig, placement: Any) -> dict[str, Any]:
    """Ray actor options of one engine: its resources and the environment that vLLM reads while it is imported."""
    return process_options(workers, VLLM_ENABLE_V1_MULTIPROCESSING="0", **ENGINE_VARIABLES) | {"scheduling_strategy": placement}


class VllmRolloutPool:
    """`RolloutPool` over engine actors: every batch is dealt over the engines and comes back in its order."""

    def __init__(self, engines: Sequence[Any], *, deadline_seconds: float) -> None:
        self.engines = list(engines)
        self._deadline_seconds = deadline_seconds

    def ready(self) -> None:
        """Wait until every engine has loaded. Raises RolloutError when one cannot start, DeadlineError when it does not in time."""
        self.each("pid")

    def submit(self, prompts: Sequence[Prompt], *, seed: int) -> Remote[list[Rollout]]:
        samples = _sample_numbers(prompts)
        seeds = [request_seed(seed, prompt.id, sample) for prompt, sample in zip(prompts, samples, strict=True)]
        count = len(self.engines)
        calls = [
            engine.generate.remote([prompt.ids for prompt in prompts[k::count]], seeds[k::count])
            for k, engine in enumerate(self.engines)
            if prompts[k::count]
        ]

        def finish(answers: list[tuple[int, list[Sampled]]]) -> list[Rollout]:
            return [
                _rollout(prompt, sample, answers[i % count][0], answers[i % count][1][i // count])
                for i, (prompt, sample) in enumerate(zip(prompts, samples, strict=True))
            ]

        return Remote(calls, finish, phase="rollout", deadline_seconds=self._deadline_seconds, failure=RolloutError)

    def sample(self, prompts: Sequence[IntArray], settings: Sequence[Mapping[str, Any]]) -> list[IntArray]:
        """One response (token ids) per prompt, each under vLLM sampling settings of its own. Raises RolloutError."""
        count = len(self.engines)
        calls = [engine.sample.remote(prompts[k::count], settings[k::count]) for k, engine in enumerate(self.engines) if prompts[k::count]]
        answers = collect(calls, phase="rollout", deadline_seconds=self._deadline_seconds, failure=RolloutError)
        return [answers[i % count][i // count] for i in range(len(prompts))]

    def logprobs(self, sequences: Sequence[IntArray]) -> list[FloatArray]:
        return self.each("logprobs", list(sequences))[0]

    def each(self, method: str, *args: Any) -> list[Any]:
        """Call `method` on every engine and wait for all answers."""
        calls = [getattr(engine, method).remote(*args) for engine in self.engines]
        return collect(calls, phase=f"rollout engine: {method}", deadline_seconds=self._deadline_seconds, failure=RolloutError)


def _sample_numbers(prompts: Sequence[Prompt]) -> list[int]:
    """0 for the first occurrence of a prompt in the batch, 1 for the second, ..."""
    seen: Counter[str] = Counter()
    numbers = []
    for prompt in prompts:
        numbers.append(seen[prompt.id])
        seen[prompt.id] += 1
    return numbers


def _rollout(prompt: Prompt, sample: int, version: int, sampled: Sampled) -> Rollout:
    ids, logprobs, reason = sampled
    if not len(ids) or not np.isfinite(logprobs).all():
        raise RolloutError(
            f"prompt {prompt.id}: the engine returned {len(ids)} tokens with log-probs {logprobs[:4]}...: "
            "its weights are not finite, or the prompt fills the whole context"
        )
    return Rollout(prompt, sample, ids, logprobs, FinishReason(reason), version)


@contextmanager
def rollout_pool(
    model_path: str,
    config: RolloutConfig,
    *,
    precision: str,
    max_prompt_length: int,
    eos_ids: Sequence[int],
    seed: int,
    deadline_seconds: float,
    placement: Sequence[Any] = (),
) -> Iterator[VllmRolloutPool]:
    """Start the engines and end their processes at exit. They load while the caller goes on; `ready` waits for them.

    model_path: HF folder or hub name that the engines start from (policy version 0); placement: a Ray scheduling strategy
    per engine (default: wherever there is room).
    """
    max_model_len = config.max_model_len or max_prompt_length + config.max_new_tokens
    engine_class = ray.remote(RolloutEngine)
    engines = [
        engine_class.options(**engine_options(config.engines, placement[k] if placement else "DEFAULT")).remote(
            model_path, config, precision=precision, max_model_len=max_model_len, eos_ids=list(eos_ids), seed=seed + k
        )
        for k in range(config.engines.count)
    ]
    try:
        yield VllmRolloutPool(engines, deadline_seconds=deadline_seconds)
    finally:
        for engine in engines:
            ray.kill(engine)
