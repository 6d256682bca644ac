"""The scoring service."""

from __future__ import annotations

from pydantic import Field

from app.config.shared import WorkersConfig
from app.schema import Config


class ScoringConfig(Config):
    """The Ray Serve application with two deployments: reward and reference."""

    reward: WorkersConfig = WorkersConfig(cpus=0.25)
    reference: WorkersConfig = WorkersConfig(cpus=0.25)
    max_batch_tokens: int = Field(8192, ge=1)
    """Tokens per forward pass, with the padding of models that need it."""
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
