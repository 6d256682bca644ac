"""Held-out comparison of two policies: same prompts, same sampling seeds, one reward model."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from app.config.evaluation import EvaluationConfig
from app.data.templates import Template
from app.errors import ScoringError
from app.evaluation_statistics import mean_interval, paired_bootstrap, win_rate
from app.experience import DoubleArray, Prompt, Rollout
from app.interfaces import RolloutPool
from app.rewards.part import Failed
from app.rewards.reward_model import RewardModelReward

Gold = Callable[[Prompt, str], float]


@dataclass(frozen=True)
class Answers:
    """One policy's answers to the held-out prompts, with reward-model scores and, where the task knows it, gold scores."""

    rollouts: tuple[Rollout, ...]
    texts: tuple[str, ...]
    scores: np.ndarray[Any, np.dtype[np.float64]]
    gold: np.ndarray[Any, np.dtype[np.float64]] | None
    kl: np.ndarray[Any, np.dtype[np.float64]]

    @property
    def mean_length(self) -> float:
        """Response tokens."""
        return float(np.mean([len(rollout.ids) for rollout in self.rollouts]))

    @property
    def distinct_share(self) -> float:
        """Share of answers that no earlier prompt got: 1 when all differ."""
        return len(set(self.texts)) / len(self.texts)


def answer(
    pool: RolloutPool, judge: RewardModelReward, prompts: Sequence[Prompt], template: Template, config: EvaluationConfig, gold: Gold | None
) -> Answers:
    """Sample one answer per prompt from the policy that the pool holds now, and judge it.

    `kl` is per sequence the summed k1 estimate, log p(policy) - log p(reference) over the response tokens. Raises ScoringError.
    """
    rollouts = pool.submit(prompts, seed=config.seed).result()
    pending_scores = judge.score(rollouts)
    pending_reference = judge.scorer.logprobs([rollout.sequence for rollout in rollouts])
    texts = tuple(template.decode(rollout.ids) for rollout in rollouts)
    kl = [float((r.logprobs - r.of_response(row)).sum()) for r, row in zip(rollouts, pending_reference.result(), strict=True)]
    return Answers(
        rollouts=tuple(rollouts),
        texts=texts,
        scores=_all_scores(pending_scores.result(), prompts),
        gold=np.array([gold(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]) if gold else None,
        kl=np.asarray(kl),
    )


def _all_scores(scores: Sequence[float | Failed], prompts: Sequence[Prompt]) -> DoubleArray:
    """float64 [B]; raises ScoringError where one failed."""
    for score, prompt in zip(scores, prompts, strict=True):
        if isinstance(score, Failed):
            raise ScoringError(f"the answer to the held-out prompt {prompt.id} cannot be scored: {score.reason}")
    return np.array(scores, dtype=np.float64)


def compare(before: Answers, after: Answers, config: EvaluationConfig) -> dict[str, Any]:
    """The numbers of the comparison, ready for `summary.json`: means with 95 % bootstrap intervals, paired by prompt."""

    def mean(values: np.ndarray[Any, Any]) -> dict[str, float]:
        return mean_interval(values, resamples=config.bootstrap, seed=config.seed).as_dict()

    def gain(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> dict[str, float]:
        return paired_bootstrap(b - a, resamples=config.bootstrap, seed=config.seed).as_dict()

    judge_before, judge_after = (before.scores, after.scores) if before.gold is None or after.gold is None else (before.gold, after.gold)
    results = {
        "eval_prompts": len(before.texts),
        "reward_before": mean(before.scores),
        "reward_after": mean(after.scores),
        "reward_gain": gain(before.scores, after.scores),
        "win_rate": win_rate(judge_after.tolist(), judge_before.tolist(), resamples=config.bootstrap, seed=config.seed).as_dict(),
        "win_rate_judge": "reward model" if before.gold is None else "gold",
        "kl": float(after.kl.mean()),
        "length_before": before.mean_length,
        "length_after": after.mean_length,
        "distinct_before": before.distinct_share,
        "distinct_after": after.distinct_share,
    }
    if before.gold is not None and after.gold is not None:
        results |= {"gold_before": mean(before.gold), "gold_after": mean(after.gold), "gold_gain": gain(before.gold, after.gold)}
    return results


def write_examples(path: Path, prompts: Sequence[Prompt], before: Answers, after: Answers, count: int) -> None:
    """The first `count` answers side by side, one JSON object a line."""
    with path.open("w", encoding="utf-8") as out:
        for i, prompt in enumerate(prompts[:count]):
            row = {
                "prompt": prompt.text,
                "before": before.texts[i],
                "after": after.texts[i],
                "reward_before": float(before.scores[i]),
                "reward_after": float(after.scores[i]),
                "gold_before": None if before.gold is None else float(before.gold[i]),
                "gold_after": None if after.gold is None else float(after.gold[i]),
            }
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
