"""Scores of a sampling report: what a reward model thinks of every output, and its means per sampling configuration."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any, Protocol

from app.evaluation.sampling_report import Conversation, SamplingReport

Replies = tuple[Conversation, Sequence[str]]
"""A conversation that ends in a user turn, and replies to it."""


class ReplyScorer(Protocol):
    """A judge of replies."""

    def score(self, replies: Sequence[Replies]) -> list[list[float]]:
        """One finite number per reply, higher is better. Raises ScoringError."""
        ...


def score_report(report: SamplingReport, scorer: ReplyScorer) -> dict[str, float]:
    """Mean score of the outputs of each sampling configuration, and of all outputs as `mean_reward`."""
    blocks = [(prompt.conversation, result) for prompt in report.prompts for result in prompt.results if result.outputs]
    scores: dict[str, list[float]] = {}
    for (_, result), given in zip(blocks, scorer.score([(asked, result.outputs) for asked, result in blocks]), strict=True):
        scores.setdefault(result.sampling_config, []).extend(given)
    means = {name: fmean(values) for name, values in scores.items()}
    return {**means, "mean_reward": fmean(score for values in scores.values() for score in values)}


def score_summary(report: SamplingReport, scorer: ReplyScorer, *, reward_model: str) -> dict[str, Any]:
    """What `corral evaluate score` writes, with the keys of Open-Assistant's tool: model_name, results, reward_model."""
    return {"model_name": report.model_name, "results": score_report(report, scorer), "reward_model": reward_model}
