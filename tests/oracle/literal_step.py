"""One step of every algorithm written out literally: loops over floats, row by row and token by token, nothing shared with app."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field


@dataclass
class Token:
    behaviour: float
    proximal: float
    reference: float
    current: float
    entropy: float
    old_value: float = 0.0
    value: float = 0.0
    advantage: float = 0.0  # as the policy loss reads it
    returns: float = 0.0


@dataclass
class Row:
    score: float  # NaN: failed
    group: int
    tokens: list[Token] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        return math.isnan(self.score)


@dataclass(frozen=True)
class Settings:
    """How one algorithm is run. `name`: ppo, grpo, rloo or reinforce_pp."""

    name: str
    kl_coef: float = 0.0
    kl_in_reward: bool = True
    kl_in_loss: str | None = None
    gamma: float = 1.0
    lam: float = 1.0
    clip: float = 0.2
    clip_high: float | None = None
    dual_clip: float | None = None
    value_clip: float | None = None
    value_coef: float = 0.0
    entropy_coef: float = 0.0
    max_importance: float = 2.0
    max_lag: int = 0
    whiten: bool = False
    divide_by_std: bool = True
    per_sequence: bool = False
    group_baseline: bool = False


def credit(rows: list[Row], settings: Settings) -> None:
    """Fill in advantages and returns."""
    scored = [row for row in rows if not row.failed]
    for row in scored:
        for t, token in enumerate(row.tokens):
            token.advantage = _advantage(row, t, scored, settings)
            token.returns = token.advantage + token.old_value
    tokens = [token for row in scored for token in row.tokens]
    if settings.whiten or settings.name == "reinforce_pp":
        mean = sum(token.advantage for token in tokens) / len(tokens)
        variance = sum((token.advantage - mean) ** 2 for token in tokens) / len(tokens)
        for token in tokens:
            token.advantage = (token.advantage - mean) / math.sqrt(variance + 1e-8)


def _advantage(row: Row, t: int, scored: list[Row], settings: Settings) -> float:
    rewards = _rewards(row, settings)
    group = [other for other in scored if other.group == row.group]
    totals = [sum(_rewards(other, settings)) for other in group]
    if settings.name == "grpo":
        apart = sum(rewards) - statistics.mean(totals)
        if not settings.divide_by_std:
            return apart
        return apart / (statistics.stdev(totals) + 1e-4) if len(group) > 1 else 0.0
    if settings.name == "rloo":
        others = [total for other, total in zip(group, totals, strict=True) if other is not row]
        return sum(rewards) - statistics.mean(others) if others else 0.0
    if settings.name == "reinforce_pp":
        if settings.group_baseline:
            rewards[-1] -= statistics.mean(other.score for other in group)
        return sum(settings.gamma ** (k - t) * rewards[k] for k in range(t, len(rewards)))
    advantage = 0.0
    for k in range(t, len(rewards)):
        value_after = row.tokens[k + 1].old_value if k + 1 < len(rewards) else 0.0
        delta = rewards[k] + settings.gamma * value_after - row.tokens[k].old_value
        advantage += (settings.gamma * settings.lam) ** (k - t) * delta
    return advantage


def _rewards(row: Row, settings: Settings) -> list[float]:
    coef = settings.kl_coef if settings.kl_in_reward else 0.0
    rewards = [-coef * (token.proximal - token.reference) for token in row.tokens]
    rewards[-1] += row.score
    return rewards


def losses(rows: list[Row], settings: Settings) -> tuple[float, float]:
    """(policy loss, value loss with its coefficient)."""
    scored = [row for row in rows if not row.failed]
    count = sum(len(row.tokens) for row in scored)
    policy, value = 0.0, 0.0
    for row in scored:
        for token in row.tokens:
            share = 1 / (len(scored) * len(row.tokens)) if settings.per_sequence else 1 / count
            policy += share * _token_loss(token, settings)
            value += _value_loss(token, settings) / count
    return policy, settings.value_coef * value


def _token_loss(token: Token, settings: Settings) -> float:
    ratio = math.exp(token.current - token.proximal)
    high = settings.clip if settings.clip_high is None else settings.clip_high
    bounded = min(max(ratio, 1 - settings.clip), 1 + high)
    objective = min(ratio * token.advantage, bounded * token.advantage)
    if settings.dual_clip is not None and token.advantage < 0:
        objective = max(objective, settings.dual_clip * token.advantage)
    weight = min(math.exp(token.proximal - token.behaviour), settings.max_importance) if settings.max_lag else 1.0
    loss = -weight * objective
    if settings.kl_in_loss is not None:
        sampler = token.behaviour if settings.max_lag else token.proximal
        weight = min(math.exp(token.current - sampler), settings.max_importance)
        apart = token.current - token.reference
        loss += settings.kl_coef * weight * (apart**2 / 2 if settings.kl_in_loss == "k2" else math.exp(-apart) - 1 + apart)
    return loss - settings.entropy_coef * token.entropy


def _value_loss(token: Token, settings: Settings) -> float:
    error = (token.value - token.returns) ** 2
    if settings.value_clip is not None:
        near = min(max(token.value, token.old_value - settings.value_clip), token.old_value + settings.value_clip)
        error = max(error, (near - token.returns) ** 2)
    return error / 2
