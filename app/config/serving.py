"""The scoring service that `corral serve` runs: named models behind HTTP and gRPC."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, model_validator

from app.config.shared import WorkersConfig
from app.schema import Config, InputPath, OutputPath

ModelKind = Literal["reward", "reference"]

Output = Literal["rewards", "logprobs", "logits"]
"""rewards: float32, one per sequence. logprobs: float32, S - 1 per sequence of S; entry t = log p(ids[t+1] | ids[..t]).
logits: float16 [S, V] per sequence."""

OUTPUTS: dict[ModelKind, tuple[Output, ...]] = {"reward": ("rewards",), "reference": ("logprobs", "logits")}
"""What a model answers; the first is what it answers unasked."""

DOORS = "doors"
"""The deployment that takes the requests, beside one deployment per model."""
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class BatchingConfig(Config):
    """How requests of all callers are put together."""

    max_batch_tokens: int = Field(8192, ge=1)
    """Tokens per forward pass, with the padding of models that need it."""
    wait_seconds: float = Field(0.005, ge=0)
    """How long an idle model waits for more callers before it computes."""
    max_waiting_tokens: int = Field(2**22, ge=1)
    """Tokens that may wait in one replica; requests beyond are refused as overloaded, with the time after which to ask again."""
    cache_entries: int = Field(0, ge=0)
    """Answers kept by content (model version, ids), the oldest dropped first; 0 keeps none."""


class ServedModelConfig(Config):
    """One named model: a reward model that scores, or a reference policy that gives log-probs."""

    path: InputPath
    """Hugging Face folder (a reward model, or a causal language model)."""
    kind: ModelKind | None = None
    """Default: seen from the folder."""
    version: str = Field("1", coerce_numbers_to_str=True)
    """Label that every answer carries beside the hash of the weights."""
    temperature: float = Field(1.0, gt=0)
    """Log-probs are those of the logits divided by this (reference policies)."""
    workers: WorkersConfig = WorkersConfig(cpus=0.25)
    """Replicas, and what each of them takes."""
    max_replicas: int | None = Field(None, ge=1)
    """Scale between `workers.count` and this many replicas by load; default: fixed."""
    target_ongoing_requests: float = Field(8.0, gt=0)
    """Requests in flight per replica that autoscaling aims at."""
    upscale_delay_seconds: float = Field(10.0, ge=0)
    """How long the load must be above the target before a replica is added."""
    downscale_delay_seconds: float = Field(300.0, ge=0)
    """How long the load must be below the target before a replica is taken away."""
    surge_percent: int = Field(100, ge=0, le=100)
    """Replicas that a rolling update may start beside the old ones, which answer until then. With 0 an update needs no room (a spare
    GPU), but replaces every replica after it has stopped: a model with one replica makes its callers wait."""
    batching: BatchingConfig = BatchingConfig()
    timeout_seconds: float = Field(60.0, gt=0)
    """Deadline of one request inside the service."""

    @model_validator(mode="after")
    def _scales_up(self) -> ServedModelConfig:
        if self.max_replicas is not None and self.max_replicas < self.workers.count:
            raise ValueError(f"max_replicas = {self.max_replicas} is below workers.count = {self.workers.count}: raise it, or leave it out")
        return self


class ChatModelConfig(Config):
    """One language model to chat with: a vLLM engine behind OpenAI's chat protocol."""

    path: InputPath
    """Hugging Face folder of a causal language model whose tokenizer has a chat template."""
    workers: WorkersConfig = WorkersConfig()
    """Engines, and what each of them takes; several GPUs to one engine share its layers (tensor parallel)."""
    max_model_len: int = Field(4096, ge=16)
    """Tokens of a conversation and its answer together; at most the model's context."""
    kv_cache_gib: float = Field(0.5, gt=0)
    """KV cache of a CPU engine, GiB; it must hold one conversation of max_model_len tokens."""
    gpu_memory_utilization: float = Field(0.85, gt=0, le=1)
    """Share of a GPU's memory that an engine may use."""


class ServingConfig(Config):
    """The service's doors. One application holds all models, so that a client needs a host, a port and a model's name."""

    models: dict[str, ServedModelConfig] = Field(default_factory=dict)
    """Models by name: letters, digits, `-`, `_` and `.`; not `doors`."""
    host: str = "127.0.0.1"
    """Interface to listen on. Any other than a loopback one needs a token."""
    http_port: int = Field(8000, ge=0, le=65535)
    """Open Inference Protocol v2 over HTTP, and `/score`; 0 takes a free one."""
    grpc_port: int = Field(8001, ge=0, le=65535)
    """Open Inference Protocol v2 over gRPC; 0 takes a free one."""
    token_file: InputPath | None = None
    """File with the bearer token that requests must carry; the environment variable CORRAL_SERVE_TOKEN stands in for it."""
    max_request_bytes: int = Field(16 * 2**20, ge=1024)
    """Longest body of a request, after decompression. JSON takes about 20 times its length in memory while it is read."""
    max_request_sequences: int = Field(1024, ge=1)
    """Sequences of one request."""
    max_logits_bytes: int = Field(256 * 2**20, ge=1024)
    """Largest `logits` output of one request."""
    access_log: OutputPath | None = None
    """File that gets one line of JSON per request; default: the doors' standard output, which Ray keeps among its logs."""
    chat: dict[str, ChatModelConfig] = Field(default_factory=dict)
    """Models to chat with by name, at `/v1/chat/completions` of the same HTTP port."""

    @model_validator(mode="after")
    def _names(self) -> ServingConfig:
        for name in (*self.models, *self.chat):
            if not MODEL_NAME.fullmatch(name) or name == DOORS:
                raise ValueError(f"a model cannot be called {name!r}: choose letters, digits, `-`, `_` and `.`, and not {DOORS}")
        for name in self.models.keys() & self.chat.keys():
            raise ValueError(f"models and chat both name a model {name!r}: rename one of them")
        if self.http_port == self.grpc_port != 0:
            raise ValueError(f"http_port and grpc_port are both {self.http_port}: choose two ports")
        return self
