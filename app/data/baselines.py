"""Rankers that need no model; a reward model has to beat them by a margin before its accuracy means anything."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import combinations
from typing import TypeVar

import numpy as np
import torch

from app.errors import DataError
from app.formats.records import Message, RankedGroup
from app.numerics import ranking_metrics, ranking_sums

T = TypeVar("T")


def pair_accuracy(scores: Sequence[Sequence[float]]) -> float:
    """Share of ordered pairs (better, worse) whose better reply scores higher; ties count half. scores: per group, best first."""
    wins = [_win(better, worse) for group in scores for better, worse in _pairs(group)]
    if not wins:
        raise DataError("no ranked pairs to compare; the data needs prompts with two or more ranked replies")
    return sum(wins) / len(wins)


def length_baseline(train: Iterable[RankedGroup], validation: Iterable[RankedGroup]) -> dict[str, float]:
    """How well "the longer reply is better" (characters) orders `validation`, or its opposite where that orders `train` better.

    pair_accuracy, best_vs_worst, kendall_tau and spearman as in `app.numerics.ranking_metrics`. Raises DataError without groups.
    """
    sign = 1.0 if _length_metrics(train, 1.0)["pair_accuracy"] >= 0.5 else -1.0
    return _length_metrics(validation, sign)


def _length_metrics(groups: Iterable[RankedGroup], sign: float) -> dict[str, float]:
    lengths = [[sign * len(reply) for reply in group.replies] for group in groups]
    if not lengths:
        raise DataError("no ranked groups to compare; the data needs prompts with two or more ranked replies")
    lengths_N = torch.tensor([length for of_group in lengths for length in of_group])
    metrics = ranking_metrics(ranking_sums(lengths_N, [len(of_group) for of_group in lengths]))
    return {name: metrics[name] for name in ("pair_accuracy", "best_vs_worst", "kendall_tau", "spearman")}


def bag_of_words_baseline(train: Sequence[RankedGroup], validation: Sequence[RankedGroup], *, steps: int = 300, l2: float = 1e-3) -> float:
    """Pair accuracy on `validation` of a logistic ranker over the word counts of the reply alone, fitted on the pairs of `train`."""
    words = sorted({word for group in train for reply in group.replies for word in _words(reply)})
    vocabulary = {word: index for index, word in enumerate(words)}
    pairs = (pair for group in train for pair in _pairs(group.replies))
    differences = np.array([_vector(better, vocabulary) - _vector(worse, vocabulary) for better, worse in pairs])
    weights = np.zeros(len(vocabulary))
    momentum = np.zeros_like(weights)
    for _ in range(steps):
        wrong = 1.0 / (1.0 + np.exp(np.clip(differences @ weights, -30, 30)))
        momentum = 0.9 * momentum + wrong @ differences / len(differences) - l2 * weights
        weights += momentum
    return pair_accuracy([[float(_vector(reply, vocabulary) @ weights) for reply in group.replies] for group in validation])


def best_constant_answer(
    groups: Sequence[RankedGroup], candidates: Sequence[str], gold: Callable[[Sequence[Message], str], float]
) -> tuple[str, float]:
    """The candidate whose mean gold score over all prompts is highest, and that mean."""
    means = [(math.fsum(gold(group.prefix, answer) for group in groups) / len(groups), answer) for answer in candidates]
    mean, answer = max(means)
    return answer, mean


def _pairs(group: Sequence[T]) -> Iterator[tuple[T, T]]:
    return combinations(group, 2)


def _win(better: float, worse: float) -> float:
    return 1.0 if better > worse else 0.5 if better == worse else 0.0


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _vector(text: str, vocabulary: dict[str, int]) -> np.ndarray:
    out = np.zeros(len(vocabulary))
    for word, count in Counter(_words(text)).items():
        if word in vocabulary:
            out[vocabulary[word]] = count
    return out
