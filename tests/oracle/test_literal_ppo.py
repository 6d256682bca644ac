"""One whole PPO step, credit and losses, against a literal version: loops over floats, row by row and token by token."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import pytest
import torch

from app.algorithms.ppo import Ppo, PpoConfig
from app.experience import Experience, Minibatch, PolicyOutputs, TokenBatch, Totals

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
KL_COEF = 0.07


@dataclass
class Token:
    behaviour: float
    proximal: float
    reference: float
    current: float
    old_value: float
    value: float
    entropy: float
    advantage: float = 0.0
    whitened: float = 0.0
    returns: float = 0.0


def draw_rows() -> list[tuple[float, list[Token]]]:
    """Score and tokens of each row; the third row's score failed."""
    draw = random.Random(29)
    rows = []
    for row, length in enumerate([4, 1, 3, 6, 2]):
        tokens = []
        for _ in range(length):
            proximal = -draw.expovariate(1)
            old_value = draw.gauss(0, 1)
            tokens.append(
                Token(
                    behaviour=proximal + draw.gauss(0, 0.5),
                    proximal=proximal,
                    reference=proximal + draw.gauss(0, 0.5),
                    current=proximal + draw.gauss(0, 0.3),
                    old_value=old_value,
                    value=old_value + draw.gauss(0, 0.3),
                    entropy=draw.random(),
                )
            )
        rows.append((math.nan if row == 2 else draw.gauss(0, 2), tokens))
    return rows


def literal_credit(rows: list[tuple[float, list[Token]]], gamma: float, lam: float) -> None:
    for score, tokens in rows:
        for t in range(len(tokens)):
            advantage = 0.0
            for k in range(t, len(tokens)):
                reward = -KL_COEF * (tokens[k].proximal - tokens[k].reference)
                if k == len(tokens) - 1:
                    reward += score
                value_after = tokens[k + 1].old_value if k + 1 < len(tokens) else 0.0
                advantage += (gamma * lam) ** (k - t) * (reward + gamma * value_after - tokens[k].old_value)
            tokens[t].advantage = advantage
            tokens[t].returns = advantage + tokens[t].old_value
    scored = [token for score, tokens in rows if not math.isnan(score) for token in tokens]
    mean = sum(token.advantage for token in scored) / len(scored)
    variance = sum((token.advantage - mean) ** 2 for token in scored) / len(scored)
    for token in scored:
        token.whitened = (token.advantage - mean) / math.sqrt(variance + 1e-8)


def literal_losses(rows: list[tuple[float, list[Token]]], config: PpoConfig, max_lag: int) -> tuple[float, float]:
    policy, value, count = 0.0, 0.0, 0
    for score, tokens in rows:
        if math.isnan(score):
            continue
        for token in tokens:
            count += 1
            ratio = math.exp(token.current - token.proximal)
            bounded = min(max(ratio, 1 - config.clip), 1 + config.clip)
            weight = min(math.exp(token.proximal - token.behaviour), config.max_importance) if max_lag > 0 else 1.0
            policy += -weight * min(ratio * token.whitened, bounded * token.whitened)
            assert config.value_clip is not None
            near = min(max(token.value, token.old_value - config.value_clip), token.old_value + config.value_clip)
            value += max((token.value - token.returns) ** 2, (near - token.returns) ** 2) / 2
    return policy / count, config.value_coef * value / count


@pytest.mark.parametrize("lam", [0.9, 0.95, 1.0])
@pytest.mark.parametrize("gamma", [0.97, 1.0])
@pytest.mark.parametrize("max_lag", [0, 1])
def test_step(gamma: float, lam: float, max_lag: int) -> None:
    rows = draw_rows()
    config = PpoConfig(gamma=gamma, lam=lam, value_coef=0.3)
    literal_credit(rows, gamma, lam)
    lengths_B = torch.tensor([len(tokens) for _, tokens in rows])
    mask_BT = torch.arange(6) < lengths_B[:, None]

    def padded(name: str) -> torch.Tensor:
        return torch.tensor([[getattr(token, name) for token in tokens] + [0.0] * (6 - len(tokens)) for _, tokens in rows])

    experience = Experience(
        tokens=TokenBatch(torch.zeros(5, 7).long(), torch.ones(5, 7).bool(), torch.ones(5).long(), lengths_B, mask_BT),
        scores_B=torch.tensor([score for score, _ in rows]),
        behaviour_BT=padded("behaviour"),
        proximal_BT=padded("proximal"),
        reference_BT=padded("reference"),
        values_BT=padded("old_value"),
    )
    credited = Ppo(config).credit(experience, kl_coef=KL_COEF)
    scored_B = torch.tensor([True, True, False, True, True])
    assert credited.mask_BT.equal(mask_BT & scored_B[:, None])
    assert credited.advantages_BT is not None
    assert credited.returns_BT is not None
    torch.testing.assert_close(credited.advantages_BT[scored_B], padded("whitened")[scored_B], **CLOSE)
    torch.testing.assert_close(credited.returns_BT[scored_B], padded("returns")[scored_B], **CLOSE)

    outputs = PolicyOutputs(padded("current"), padded("value"), padded("entropy"))
    minibatch = Minibatch.from_rows(credited, torch.arange(5))
    loss = Ppo(config).loss(outputs, minibatch, Totals(tokens=13, sequences=4), max_lag=max_lag)
    policy, value = literal_losses(rows, config, max_lag)
    torch.testing.assert_close(loss.policy, torch.tensor(policy), **CLOSE)
    torch.testing.assert_close(loss.value, torch.tensor(value), **CLOSE)
