"""One vLLM engine in a Ray actor: samples responses, judges sequences, and takes new weights while it does.

The engine core runs in the actor's own process, so the weights that a push brings through Ray's object store are handed to it
as arrays, without a copy on the way, and between any two tokens.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from app.config.rollout import RolloutConfig
from app.experience import FloatArray, IntArray
from app.workers.engine_settings import DTYPES, cpu_settings, gpu_settings, require_compiler
from app.workers.engine_thread import EngineThread, Landed
from app.workers.network import use_node_address
from app.workers.pushed_policy import PushedPolicy, Weights
from app.workers.stacks import write_stacks_on_signal

WORKER_EXTENSION = "app.workers.object_store_worker.ObjectStoreWorker"
"""By name, because importing it imports vLLM."""

WAIT_SECONDS = 0.02
"""Between two looks whether the requests in flight have ended, with rollout.in_flight = "wait"."""

T = TypeVar("T")


class Sampled(NamedTuple):
    """One response: ids and versions int32 [T], logprobs float32 [T], and why it ended."""

    ids: IntArray
    logprobs: FloatArray
    versions: IntArray
    finish: str


class RolloutEngine:
    """Asynchronous actor: any number of calls at a time share the engine's steps."""

    def __init__(
        self, model_path: str, config: RolloutConfig, *, precision: str, max_model_len: int, eos_ids: Sequence[int], seed: int
    ) -> None:
        write_stacks_on_signal("rollout engine")
        use_node_address()
        self._config = config
        self._eos_ids = list(eos_ids)
        load = partial(load_engine, model_path, config, precision=precision, max_model_len=max_model_len, seed=seed)
        self._engine = EngineThread(load, redo=config.in_flight == "redo", sleeps=config.shares_gpus)

    async def generate(self, prompts: Sequence[IntArray], seeds: Sequence[int]) -> AsyncIterator[list[tuple[int, Sampled]]]:
        """Sample one response per prompt; those that end with the same step are handed out at once, with their places in `prompts`.

        All prompts join the engine between the same two steps.
        """
        common = {"max_tokens": self._config.max_new_tokens, "temperature": self._config.temperature, "logprobs": 0}
        async for landed in self._outputs(prompts, [self._sampling(**common, seed=seed) for seed in seeds]):
            yield [(place, _sampled(output.outputs[0])) for place, output in landed]

    async def sample(self, prompts: Sequence[IntArray], settings: Sequence[Mapping[str, Any]]) -> list[IntArray]:
        """Sample one response per prompt, each under vLLM sampling settings of its own. Returns token ids, in the order of `prompts`."""
        found = await self._all(prompts, [self._sampling(**one) for one in settings])
        return [np.asarray(output.outputs[0].token_ids, dtype=np.int32) for output in found]

    async def logprobs(self, sequences: Sequence[IntArray]) -> list[FloatArray]:
        """Log-probs [S-1] of given sequences under the current weights, at temperature 1."""
        settings = self._sampling(max_tokens=1, prompt_logprobs=0)
        found = await self._all(sequences, [settings] * len(sequences))
        # There is no distribution before the first token.
        return [_of_tokens(output.prompt_logprobs[1:], ids[1:]) for output, ids in zip(found, sequences, strict=True)]

    async def load_policy(self, policy: PushedPolicy, version: int) -> None:
        """Replace all weights by those of `policy`; tokens from here on carry `version`.

        What happens to requests in flight is `rollout.in_flight`. Raises WeightPushError, and goes on as it was, where they are not
        what was sent.
        """
        await self._load(partial(policy.weights, version), version)

    async def load_folder(self, path: str, version: int) -> None:
        """Replace all weights by those of a Hugging Face folder of the same architecture. Needs rollout.transfer = object_store."""
        from safetensors.torch import load_file

        files = sorted(Path(path).glob("*.safetensors"))
        await self._load(lambda: ({name: x.float().numpy() for name, x in load_file(file).items()} for file in files), version)

    async def transfer(self, method: str, *args: Any) -> None:
        """Call one step of vLLM's weight-transfer interface on the workers of this engine."""
        await self._ask(partial(self._engine.transfer, method, *args))

    async def start_update(self) -> None:
        """Make ready for weights that another process sends; until `finish_update` no step is taken.

        What happens to requests in flight is `rollout.in_flight`.
        """
        await self._settle()
        await self._ask(self._engine.begin_update)

    async def finish_update(self, version: int) -> None:
        """All weights are there; tokens from here on carry `version`."""
        await self._ask(partial(self._engine.end_update, version))

    async def discard(self) -> None:
        """Drop what is in flight: nobody waits for it any more."""
        await self._ask(self._engine.discard)

    async def pid(self) -> int:
        return os.getpid()

    async def _ask(self, work: Callable[[], T]) -> T:
        return await asyncio.wrap_future(self._engine.call(work))

    async def _outputs(self, prompts: Sequence[IntArray], params: Sequence[Any]) -> AsyncIterator[Landed]:
        """What becomes of every prompt, as they end."""
        event_loop, landed = asyncio.get_running_loop(), asyncio.Queue[Landed]()

        def land(ended: Landed) -> None:
            event_loop.call_soon_threadsafe(landed.put_nowait, ended)

        await self._ask(partial(self._engine.admit, prompts, params, land))
        missing = len(prompts)
        while missing:
            ended = await landed.get()
            for _, output in ended:
                if isinstance(output, BaseException):
                    raise output
            missing -= len(ended)
            yield ended

    async def _all(self, prompts: Sequence[IntArray], params: Sequence[Any]) -> list[Any]:
        """vLLM's RequestOutput of every prompt, in their order."""
        found = {place: output async for ended in self._outputs(prompts, params) for place, output in ended}
        return [found[place] for place in range(len(prompts))]

    async def _settle(self) -> None:
        """Before new weights: with rollout.in_flight = "wait" until nothing is in flight."""
        while self._config.in_flight == "wait" and await self._ask(self._engine.any_in_flight):
            await asyncio.sleep(WAIT_SECONDS)

    async def _load(self, buckets: Callable[[], Iterable[Weights]], version: int) -> None:
        await self._settle()
        await self._ask(partial(self._engine.load, buckets, version))

    def _sampling(self, **settings: Any) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        stops = None if self._config.ignore_eos or "prompt_logprobs" in settings else self._eos_ids
        # The end tokens are given here; vLLM's own idea of them would be a second source of truth.
        ending = {"detokenize": False, "stop_token_ids": stops, "ignore_eos": True, "output_kind": RequestOutputKind.FINAL_ONLY}
        return SamplingParams(**ending, **settings)


def load_engine(model_path: str, config: RolloutConfig, *, precision: str, max_model_len: int, seed: int) -> Any:
    """The `vllm.LLM` of a rollout engine. Raises RolloutError."""
    from vllm import LLM
    from vllm.config import WeightTransferConfig

    on_gpu = config.engines.gpus > 0
    if config.compiles and not on_gpu:
        require_compiler()
    return LLM(
        model=model_path,
        skip_tokenizer_init=True,
        dtype=DTYPES[precision],
        max_model_len=max_model_len,
        enforce_eager=not config.compiles,
        enable_prefix_caching=True,
        logprobs_mode="processed_logprobs",  # of the distribution that was sampled from: after temperature
        distributed_executor_backend="uni" if config.engines.tensor_parallel == 1 else "mp",
        tensor_parallel_size=config.engines.tensor_parallel,
        weight_transfer_config=WeightTransferConfig(backend=config.chosen_transfer),
        worker_extension_cls=WORKER_EXTENSION,
        enable_sleep_mode=config.shares_gpus,
        seed=seed % 2**31,
        **(gpu_settings(config) if on_gpu else cpu_settings(config.kv_cache_gib, max_model_len)),
    )


def _of_tokens(steps: Iterable[Mapping[int, Any]], ids: IntArray) -> FloatArray:
    return np.array([step[int(token)].logprob for step, token in zip(steps, ids, strict=True)], dtype=np.float32)


def _sampled(output: Any) -> Sampled:
    ids = np.asarray(output.token_ids, dtype=np.int32)
    versions = np.zeros(len(ids), dtype=np.int32)
    for span in output.weight_versions or ():
        versions[span.start : span.end] = int(span.version)
    return Sampled(ids, _of_tokens(output.logprobs, ids), versions, str(output.finish_reason))
