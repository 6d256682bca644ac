"""Rejection sampling: of all answers to a prompt the ones that a reward model scores highest are selected, the others rejected."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from app.durable import write_json
from app.evaluation.reply_scores import ReplyScorer
from app.evaluation.sampling_report import Conversation, PromptResults, SamplingReport, pool
from app.formats.records import is_usable

Scored = tuple[str, float]


@dataclass(frozen=True)
class Choice:
    """The scored answers to one prompt, both parts best first."""

    conversation: Conversation
    selected: tuple[Scored, ...]
    rejected: tuple[Scored, ...]


def best_of_n(report: SamplingReport, scorer: ReplyScorer, keep: int) -> list[Choice]:
    """All outputs of each prompt, over all its sampling configurations, scored and divided behind the best `keep`."""
    pooled = pool([report])
    scores = scorer.score([(conversation, [answer.text for answer in answers]) for conversation, answers in pooled.items()])
    choices = []
    for (conversation, answers), given in zip(pooled.items(), scores, strict=True):
        ranked = sorted(zip((answer.text for answer in answers), given, strict=True), key=lambda scored: -scored[1])
        choices.append(Choice(conversation, tuple(ranked[:keep]), tuple(ranked[keep:])))
    return choices


def comparison(choices: Sequence[Choice]) -> dict[str, dict[str, Any]]:
    """Mean, least and greatest score of the selected and of the rejected answers, null where there are none, and how many."""
    parts = {"rejected_samples": [c.rejected for c in choices], "selected_samples": [c.selected for c in choices]}
    return {name: _statistics([score for part in groups for _, score in part]) for name, groups in parts.items()}


def _statistics(scores: Sequence[float]) -> dict[str, Any]:
    if not scores:
        return {"mean": None, "min": None, "max": None, "count": 0}
    return {"mean": fmean(scores), "min": min(scores), "max": max(scores), "count": len(scores)}


def sft_rows(choices: Sequence[Choice]) -> list[dict[str, Any]]:
    """The selected answers as conversations to train on, in the `messages` format; the same answer once, unusable ones left out."""
    rows = []
    for choice in choices:
        prompt = [message.as_dict() for message in choice.conversation]
        texts = dict.fromkeys(text for text, _ in choice.selected if is_usable(text))
        rows += [{"messages": [*prompt, {"role": "assistant", "content": text}]} for text in texts]
    return rows


def write_choices(choices: Sequence[Choice], folder: Path) -> list[Path]:
    """selected_samples.json and rejected_samples.json (per prompt its outputs as [text, score], best first), comparison.json,
    and selected.jsonl (`sft_rows`). Returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / name for name in ("selected_samples.json", "rejected_samples.json", "comparison.json", "selected.jsonl")]
    write_json(files[0], [_samples(choice.conversation, choice.selected) for choice in choices])
    write_json(files[1], [_samples(choice.conversation, choice.rejected) for choice in choices])
    write_json(files[2], comparison(choices))
    files[3].write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in sft_rows(choices)), encoding="utf-8")
    return files


def _samples(conversation: Conversation, outputs: Sequence[Scored]) -> dict[str, Any]:
    asked = PromptResults.of(conversation, ()).model_dump(mode="json", exclude_none=True, exclude={"results"})
    return {**asked, "outputs": [[text, score] for text, score in outputs]}
