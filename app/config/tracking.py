"""Tracking services."""

from __future__ import annotations

from typing import Literal

from app.schema import Config


class TrackingConfig(Config):
    """Where metrics go beside metrics.jsonl and TensorBoard. Addresses and keys come from a service's own environment variables."""

    also: tuple[Literal["wandb", "mlflow"], ...] = ()
    """Services that get every metric too: `wandb`, `mlflow`. With WANDB_MODE=offline, and without MLFLOW_TRACKING_URI, it stays in the
    run folder."""
    project: str = "corral"
    """W&B project, and MLflow experiment."""
    name: str | None = None
    """The run's name there; default: the last part of run.dir."""
