"""The rollout engines."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from app.config.shared import WorkersConfig
from app.schema import Config

Transfer = Literal["object_store", "nccl", "ipc"]


class RolloutConfig(Config):
    """vLLM engines."""

    max_new_tokens: int = Field(64, ge=1)
    """Token limit of a response."""
    temperature: float = Field(1.0, ge=0.01)
    """Sampling temperature; the learner divides its logits by the same number. Below 0.01 vLLM would sample at 0.01."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus sampling. Only 1.0 is exact for PPO, so anything else is refused."""
    ignore_eos: bool = False
    """Sample to the token limit whatever comes (benchmarks); it needs ppo.reward.missing_eos_score = "null"."""
    engines: WorkersConfig = WorkersConfig()
    """`count` engines; `gpus` per engine is its tensor-parallel size where it is above 1."""
    min_engines: int | None = Field(None, ge=1)
    """Sample as soon as this many engines are up, and go on while no fewer are; the others are asked for once the learner is up, and join
    whenever the cluster has room for them. Default: all of them, all the time."""
    max_model_len: int | None = Field(None, ge=16)
    """Context length of the engine, at least data.max_prompt_length + max_new_tokens; default: longest prompt + max_new_tokens."""
    kv_cache_gib: float = Field(0.5, gt=0)
    """KV cache of a CPU engine, GiB."""
    enforce_eager: bool | None = None
    """Run the model as it stands instead of compiling it. Default: on CPUs, where compiling takes a C++ compiler and, once for each
    model, 15 seconds; a model of few million parameters then samples a fifth faster."""
    gpu_memory_utilization: float = Field(0.85, gt=0, le=1)
    """Share of a GPU's memory that the engine may use."""
    colocate: bool = False
    """Engines share the learners' GPUs and sleep while the learner works, which needs ppo.max_lag = 0."""
    in_flight: Literal["keep", "redo", "wait"] = "keep"
    """What happens to unfinished responses when new weights arrive, which takes ppo.max_lag > 0: they go on under the new weights, each
    token labelled with its policy version; start anew under them; or end first, while the push waits."""
    max_restarts: int = Field(3, ge=0)
    """Engine processes that may be lost and replaced in the course of a run before it stops."""
    transfer: Literal["auto", "object_store", "nccl", "ipc"] = "auto"
    """How weights reach the engines; `auto` takes nccl where engines own their GPUs (not a part of one), else the object store. `ipc`, with
    rollout.colocate, has them read from the GPU's memory, where the learner has them."""

    @property
    def shares_gpus(self) -> bool:
        """Whether engines sit on the learners' GPUs: on CPUs there are none to share."""
        return self.colocate and self.engines.gpus > 0

    @property
    def loads_alone(self) -> bool:
        """Whether engines have to be up before other processes come onto their GPUs. vLLM measures what a GPU has while it loads, and
        takes what others allocate meanwhile for its own, or gives up where they free something."""
        return self.shares_gpus or 0 < self.engines.gpus < 1

    @property
    def compiles(self) -> bool:
        """Whether engines compile their model."""
        return self.engines.gpus > 0 if self.enforce_eager is None else not self.enforce_eager

    @property
    def chosen_transfer(self) -> Transfer:
        """What `transfer` comes to. Two processes of one NCCL group cannot share a GPU."""
        if self.transfer == "auto":
            return "nccl" if self.engines.gpus >= 1 and not self.colocate else "object_store"
        return self.transfer

    @model_validator(mode="after")
    def _transfer_fits_the_gpus(self) -> RolloutConfig:
        if self.transfer == "ipc" and not self.shares_gpus:
            raise ValueError(
                'rollout.transfer = "ipc" hands over what lies on one GPU, and engines do not share those of the learner: set '
                'rollout.colocate = true and rollout.engines.gpus, or rollout.transfer = "auto"'
            )
        if self.transfer == "nccl" and (self.engines.gpus < 1 or self.colocate):
            given = "rollout.colocate = true" if self.colocate else f"rollout.engines.gpus = {self.engines.gpus:g}"
            raise ValueError(
                f'rollout.transfer = "nccl" takes a whole GPU for each engine, which {given} does not give: set rollout.transfer = "auto"'
            )
        return self

    @model_validator(mode="after")
    def _engines_may_come_later(self) -> RolloutConfig:
        if self.min_engines is None:
            return self
        if self.min_engines > self.engines.count:
            raise ValueError(
                f"rollout.min_engines = {self.min_engines} is more than rollout.engines.count = {self.engines.count}: lower it"
            )
        if self.chosen_transfer == "nccl" or self.colocate:
            raise ValueError(
                "rollout.min_engines lets engines join at any time, which neither an NCCL group nor a learner's GPU allows: "
                'set rollout.transfer = "object_store" and rollout.colocate = false, or drop rollout.min_engines'
            )
        return self

    @model_validator(mode="after")
    def _filters_need_matching_learner(self) -> RolloutConfig:
        if self.top_p != 1.0:
            raise ValueError(
                f"rollout.top_p = {self.top_p} samples from a distribution that the learner does not compute, "
                "which makes every importance ratio wrong: set rollout.top_p = 1.0"
            )
        return self
