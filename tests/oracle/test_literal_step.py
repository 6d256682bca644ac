"""Every algorithm's credit and losses against the literal version, on the same batch."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from app.algorithms.algorithm import Algorithm
from app.algorithms.grpo import Grpo, GrpoOptions
from app.algorithms.ppo import Ppo, PpoOptions
from app.algorithms.reinforce_pp import ReinforcePp, ReinforcePpOptions
from app.algorithms.rloo import Rloo, RlooOptions
from app.algorithms.surrogate import Surrogate, SurrogateConfig
from app.experience import Experience, Minibatch, PolicyOutputs, TokenBatch, Totals
from tests.oracle.literal_step import Row, Settings, Token, credit, losses

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
KL_COEF = 0.07
GROUPS = [4, 4, 0, 0, 4, 9, 0]  # the fourth row's score failed; the sixth row is alone in its group


def draw_rows() -> list[Row]:
    draw = random.Random(29)
    rows = []
    for number, length in enumerate([4, 1, 3, 6, 2, 5, 3]):
        row = Row(math.nan if number == 3 else draw.gauss(0, 2), GROUPS[number])
        for _ in range(length):
            proximal, old_value = -draw.expovariate(1), draw.gauss(0, 1)
            row.tokens.append(
                Token(
                    behaviour=proximal + draw.gauss(0, 0.5),
                    proximal=proximal,
                    reference=proximal + draw.gauss(0, 0.5),
                    current=proximal + draw.gauss(0, 0.3),
                    entropy=draw.random(),
                    old_value=old_value,
                    value=old_value + draw.gauss(0, 0.3),
                )
            )
        rows.append(row)
    return rows


CLIPS = {"clip": 0.15, "clip_high": 0.3, "dual_clip": 1.2, "max_importance": 1.4}
CASES: dict[str, tuple[Algorithm[Any], Settings]] = {
    **{
        f"ppo-{gamma}-{lam}": (
            Ppo(PpoOptions(gamma=gamma, lam=lam, value_coef=0.3)),
            Settings("ppo", gamma=gamma, lam=lam, value_coef=0.3, value_clip=0.2, whiten=True),
        )
        for gamma in (0.97, 1.0)
        for lam in (0.9, 0.95, 1.0)
    },
    "ppo-clips": (
        Ppo(PpoOptions(value_clip=None, whiten_advantages=False), Surrogate(SurrogateConfig(**CLIPS, entropy_coef=0.01), kl_in_loss="k2")),
        Settings("ppo", lam=0.95, value_coef=0.1, kl_in_loss="k2", entropy_coef=0.01, **CLIPS),
    ),
    "grpo": (
        Grpo(GrpoOptions(), Surrogate(kl_in_reward=False, kl_in_loss="k3")),
        Settings("grpo", kl_in_reward=False, kl_in_loss="k3", per_sequence=True),
    ),
    "grpo-in-reward": (
        Grpo(GrpoOptions(divide_by_std=False, mean_over="tokens"), Surrogate(SurrogateConfig(**CLIPS, entropy_coef=0.02))),
        Settings("grpo", divide_by_std=False, entropy_coef=0.02, **CLIPS),
    ),
    "rloo": (Rloo(RlooOptions()), Settings("rloo")),
    "reinforce_pp": (ReinforcePp(ReinforcePpOptions(gamma=0.95)), Settings("reinforce_pp", gamma=0.95)),
    "reinforce_pp-baseline": (
        ReinforcePp(ReinforcePpOptions(group_baseline=True), Surrogate(kl_in_reward=False, kl_in_loss="k2")),
        Settings("reinforce_pp", group_baseline=True, kl_in_reward=False, kl_in_loss="k2"),
    ),
}


def padded(rows: list[Row], name: str) -> torch.Tensor:
    longest = max(len(row.tokens) for row in rows)
    return torch.tensor([[getattr(token, name) for token in row.tokens] + [0.0] * (longest - len(row.tokens)) for row in rows])


@pytest.mark.parametrize("max_lag", [0, 1])
@pytest.mark.parametrize(("algorithm", "settings"), CASES.values(), ids=CASES.keys())
def test_step(algorithm: Algorithm[Any], settings: Settings, max_lag: int) -> None:
    rows = draw_rows()
    settings = replace(settings, kl_coef=KL_COEF, max_lag=max_lag)
    algorithm = replace(algorithm, surrogate=replace(algorithm.surrogate, max_lag=max_lag))
    if not algorithm.has_critic:
        for token in (token for row in rows for token in row.tokens):
            token.old_value = token.value = 0.0
    credit(rows, settings)
    lengths_B = torch.tensor([len(row.tokens) for row in rows])
    mask_BT = torch.arange(6) < lengths_B[:, None]
    experience = Experience(
        tokens=TokenBatch(torch.zeros(7, 7).long(), torch.ones(7, 7).bool(), torch.ones(7).long(), lengths_B, mask_BT),
        scores_B=torch.tensor([row.score for row in rows]),
        behaviour_BT=padded(rows, "behaviour"),
        proximal_BT=padded(rows, "proximal"),
        reference_BT=padded(rows, "reference"),
        values_BT=padded(rows, "old_value") if algorithm.has_critic else None,
        groups_B=torch.tensor(GROUPS),
    )
    credited = algorithm.credit(experience, kl_coef=KL_COEF)
    scored_B = torch.tensor([not row.failed for row in rows])
    assert credited.mask_BT.equal(mask_BT & scored_B[:, None])
    assert credited.advantages_BT is not None and credited.returns_BT is not None
    torch.testing.assert_close(credited.advantages_BT[scored_B], padded(rows, "advantage")[scored_B], **CLOSE)
    torch.testing.assert_close(credited.returns_BT[scored_B], padded(rows, "returns")[scored_B], **CLOSE)

    outputs = PolicyOutputs(padded(rows, "current"), padded(rows, "value"), padded(rows, "entropy"))
    totals = Totals(tokens=int(lengths_B[scored_B].sum()), sequences=6)
    loss = algorithm.loss(outputs, Minibatch.from_rows(credited, torch.arange(7)), totals)
    policy, value = losses(rows, settings)
    torch.testing.assert_close(loss.policy, torch.tensor(policy), **CLOSE)
    torch.testing.assert_close(loss.value, torch.tensor(value) if algorithm.has_critic else None, **CLOSE)
