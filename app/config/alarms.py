"""Alarms on the metrics of PPO: how far each may go, and what happens then."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from app.schema import Config

Action = Literal["warn", "stop", "off"]


class Above(Config):
    """An alarm on a metric that should stay low."""

    limit: float
    """The alarm fires when the metric is above this."""
    action: Action = "warn"
    """`warn` tells it, `stop` ends the run after the step is recorded."""
    patience: int = Field(1, ge=1)
    """Steps in a row that must lie beyond the limit."""


class Below(Config):
    """An alarm on a metric that should stay high."""

    limit: float
    """The alarm fires when the metric is below this."""
    action: Action = "warn"
    """`warn` tells it, `stop` ends the run after the step is recorded."""
    patience: int = Field(1, ge=1)
    """Steps in a row that must lie beyond the limit."""


class HackingAlarm(Above):
    """The alarm on the trained reward rising while the held-out one falls."""

    window: int = Field(20, ge=4)
    """Steps that are looked at; the later half of them is compared with the earlier half."""


class AlarmsConfig(Config):
    """One alarm per metric, by the metric's name. What is not finite needs none: it always stops the run."""

    logprob_mismatch: Above = Above(limit=0.05)
    max_logprob_mismatch: Above = Above(limit=5.0)
    logprob_mismatch_k3: Above = Above(limit=0.05)
    first_step_mismatch: Above = Above(limit=0.05)
    staleness: Above = Above(limit=8)
    clip_fraction: Above = Above(limit=0.5, patience=3)
    explained_variance: Below = Below(limit=-1.0, patience=10)
    kl: Above = Above(limit=100.0)
    kl_per_token: Above = Above(limit=1.0)
    entropy: Below = Below(limit=0.01, patience=3)
    response_length: Below = Below(limit=2.0, patience=3)
    finished_share: Below = Below(limit=0.5, patience=5)
    repetition_share: Above = Above(limit=0.5, patience=3)
    reward_disagreement: Above = Above(limit=3.0, patience=3)
    reward_hacking: HackingAlarm = HackingAlarm(limit=4.0)
    failed_scores: Above = Above(limit=0.05)
    masked_rows: Above = Above(limit=0.5)
