"""The held-out evaluation."""

from __future__ import annotations

from pydantic import Field

from app.schema import Config, Seed


class EvaluationConfig(Config):
    """Held-out comparison of the PPO model with the SFT model."""

    prompts: int = Field(256, ge=1)
    """Held-out prompts to answer (fewer where the data has fewer)."""
    seed: Seed = 1234
    """Sampling seed, the same for both models."""
    bootstrap: int = Field(2000, ge=100)
    """Resamples behind each confidence interval."""
    examples: int = Field(12, ge=0)
    """Answers shown side by side in the report."""
