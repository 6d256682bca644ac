"""Reports and a judge for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from app.evaluation.reply_scores import Replies
from app.evaluation.sampling_report import SamplingReport


def report(prompts: Mapping[str, Mapping[str, Sequence[str]]], model_name: str = "runs/sft/model") -> SamplingReport:
    """{prompt: {configuration: outputs}}"""
    return SamplingReport.model_validate(as_json(prompts, model_name))


def as_json(prompts: Mapping[str, Mapping[str, Sequence[str]]], model_name: str = "runs/sft/model") -> dict[str, Any]:
    results = {
        prompt: [{"sampling_config": name, "sampling_params": {"top_k": 50}, "outputs": list(outputs)} for name, outputs in answers.items()]
        for prompt, answers in prompts.items()
    }
    return {
        "model_name": model_name,
        "date": "2026-01-01T00:00:00",
        "args": {},
        "prompts": [{"prompt": prompt, "results": rows} for prompt, rows in results.items()],
    }


class CountScorer:
    """A reply scores its number of `+`, less its prompt's."""

    def __init__(self) -> None:
        self.scored = 0

    def score(self, replies: Sequence[Replies]) -> list[list[float]]:
        self.scored += sum(len(texts) for _, texts in replies)
        return [[float(text.count("+") - conversation[-1].content.count("+")) for text in texts] for conversation, texts in replies]
