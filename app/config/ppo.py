"""The PPO stage: rollouts, rewards, learner, scoring service, evaluation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from app.algorithms.ppo import PpoConfig as PpoAlgorithmConfig
from app.config.shared import DeepSpeedConfig, OptimizerConfig, WorkersConfig
from app.schema import Config


class KlConfig(Config):
    """KL penalty against the reference policy, as a part of the reward."""

    coef: float = Field(0.05, ge=0)
    """Weight of the per-token k1 estimate in the reward."""


class RewardShapingConfig(Config):
    """From reward-model score to the reward at the last token, in this order."""

    clip: float | None = Field(None, gt=0)
    """Clip scores to [-clip, clip]."""
    missing_eos_score: float | None = -1.0
    """Score of a response that ran into the token limit (never above its own score); null leaves it alone."""


class PpoConfig(Config):
    """The actor-learner loop."""

    steps: int = Field(100, ge=1)
    """Loop iterations: one batch of rollouts, one update, one weight push each."""
    batch_size: int = Field(64, ge=1)
    """Rollouts per step."""
    epochs: int = Field(4, ge=1)
    """Passes over each batch of rollouts."""
    minibatches: int = Field(1, ge=1)
    """Optimizer steps per pass."""
    micro_batch_size: int = Field(16, ge=1)
    """Rollouts per forward pass on one learner worker."""
    reuse_forward: bool = False
    """With one optimizer step per batch: learn from the forward pass that computed the proximal log-probs and values, instead
    of running it again. Saves a quarter of the learner's work and holds the activations of all its micro-batches at once."""
    max_lag: int = Field(0, ge=0)
    """How many policy versions old a rollout may be when it is trained on; 0 is synchronous PPO."""
    algorithm: PpoAlgorithmConfig = PpoAlgorithmConfig()
    kl: KlConfig = KlConfig()
    reward: RewardShapingConfig = RewardShapingConfig()
    policy: OptimizerConfig = OptimizerConfig(lr=3e-6, eps=1e-5)
    critic: OptimizerConfig = OptimizerConfig(lr=3e-6, eps=1e-5)
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    workers: WorkersConfig = WorkersConfig()
    max_logprob_mismatch: float = Field(1e-3, gt=0)
    """Largest |log p(engine) - log p(learner)| allowed on canaries after a push and, at lag 0, on rollouts."""
    max_failed_scores: float = Field(0.1, ge=0, lt=1)
    """Share of a batch whose scores may fail after all retries (they are masked out, never 0) before the run stops."""
    save_every: int = Field(50, ge=1)
    """Steps between checkpoints."""

    @model_validator(mode="after")
    def _batch_divides(self) -> PpoConfig:
        unit = self.minibatches * self.workers.count
        if self.batch_size % unit:
            raise ValueError(
                f"ppo.batch_size = {self.batch_size} is no multiple of minibatches x workers.count = "
                f"{self.minibatches} x {self.workers.count}: choose a multiple of {unit}"
            )
        rows = self.batch_size // unit
        if rows % self.micro_batch_size and rows > self.micro_batch_size:
            raise ValueError(
                f"each worker gets {rows} rollouts per minibatch, no multiple of ppo.micro_batch_size = "
                f"{self.micro_batch_size}: choose a divisor of {rows}"
            )
        return self

    @model_validator(mode="after")
    def _reused_forward_is_current(self) -> PpoConfig:
        if self.reuse_forward and self.epochs * self.minibatches > 1:
            raise ValueError(
                f"ppo.reuse_forward needs epochs = minibatches = 1, here {self.epochs} x {self.minibatches}: "
                "from the second optimizer step on the weights have moved; set ppo.reuse_forward = false"
            )
        if self.reuse_forward and self.deepspeed.zero_stage == 3:
            raise ValueError(
                "ppo.reuse_forward holds several forward passes open, between which ZeRO 3 gives the parameters back: "
                "set ppo.reuse_forward = false or ppo.deepspeed.zero_stage = 2"
            )
        return self

    @property
    def rows_per_step(self) -> int:
        """Rollouts of one minibatch on one worker."""
        return self.batch_size // (self.minibatches * self.workers.count)

    @property
    def accumulation(self) -> int:
        """Micro-batches per optimizer step on each worker."""
        return max(1, self.rows_per_step // self.micro_batch_size)


class RolloutConfig(Config):
    """vLLM engines."""

    max_new_tokens: int = Field(64, ge=1)
    """Token limit of a response."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature; the learner divides its logits by the same number."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus sampling. Only 1.0 is exact for PPO, so anything else is refused."""
    ignore_eos: bool = False
    """Sample to the token limit whatever comes (benchmarks)."""
    engines: WorkersConfig = WorkersConfig()
    """`count` engines; `gpus` per engine is its tensor-parallel size where it is above 1."""
    max_model_len: int | None = Field(None, ge=16)
    """Context length of the engine; default: longest prompt + max_new_tokens."""
    kv_cache_gib: float = Field(0.5, gt=0)
    """KV cache of a CPU engine, GiB."""
    gpu_memory_utilization: float = Field(0.85, gt=0, le=1)
    """Share of a GPU's memory that the engine may use."""
    colocate: bool = False
    """Engines share the learners' GPUs and sleep while the learner works."""
    transfer: Literal["auto", "object_store", "nccl"] = "auto"
    """How weights reach the engines; `auto` takes nccl where engines own their GPUs, else the object store."""

    @model_validator(mode="after")
    def _filters_need_matching_learner(self) -> RolloutConfig:
        if self.top_p != 1.0:
            raise ValueError(
                f"rollout.top_p = {self.top_p} samples from a distribution that the learner does not compute, "
                "which makes every importance ratio wrong: set rollout.top_p = 1.0"
            )
        return self


class ScoringConfig(Config):
    """The Ray Serve application with two deployments: reward and reference."""

    reward: WorkersConfig = WorkersConfig(cpus=0.25)
    reference: WorkersConfig = WorkersConfig(cpus=0.25)
    max_batch_tokens: int = Field(8192, ge=1)
    """Tokens (with padding) per forward pass."""
    batch_wait_seconds: float = Field(0.005, ge=0)
    """How long a deployment waits for more callers before it computes."""
    timeout_seconds: float = Field(120.0, gt=0)
    """Deadline of one request."""
    retries: int = Field(3, ge=0)
    """How often a failed request is sent again."""
    max_in_flight: int = Field(64, ge=1)
    """Requests that one client has under way at a time; further ones wait with the client, until their answers are waited for."""
    hedge_after_seconds: float | None = Field(None, gt=0)
    """Send a request that has no answer after this long a second time, to whichever replica is free, and take the first answer."""
    alone: bool = False
    """Compute requests in batches of their own, which no other caller shares: answers are then equal bit for bit whenever they are
    asked for again."""


class EvaluationConfig(Config):
    """Held-out comparison of the PPO model with the SFT model."""

    prompts: int = Field(256, ge=1)
    """Held-out prompts to answer (fewer where the data has fewer)."""
    seed: int = 1234
    """Sampling seed, the same for both models."""
    bootstrap: int = Field(2000, ge=100)
    """Resamples behind each confidence interval."""
    examples: int = Field(12, ge=0)
    """Answers shown side by side in the report."""
