"""Where a response ends, and how far a step may go."""

from __future__ import annotations

from tests.mutants.files import (
    ADVANTAGES,
    ALGORITHM,
    GAE_TESTS,
    LOSS,
    LOSS_TESTS,
    REWARD_TESTS,
    REWARDS,
    SHAPING,
    SHAPING_TESTS,
    STEP_TESTS,
)
from tests.mutants.mutant import Mutant

MUTANTS = (
    Mutant(
        "gae",
        ADVANTAGES,
        "next_value_B = torch.zeros_like(values_BT[:, 0])",
        "next_value_B = values_BT[:, -1].clone()",
        "the response is valued beyond its end",
        GAE_TESTS,
    ),
    Mutant(
        "gae", ADVANTAGES, "delta_B + gamma * lam * next_advantage_B", "delta_B + gamma * next_advantage_B", "lambda is always 1", GAE_TESTS
    ),
    Mutant(
        "gae",
        ADVANTAGES,
        "next_advantage_B = torch.where(mask_BT[:, t], advantage_B, next_advantage_B)",
        "next_advantage_B = advantage_B",
        "what is computed on padding leaks into the last token",
        GAE_TESTS,
    ),
    Mutant(
        "gae",
        ADVANTAGES,
        "for t in reversed(range(values_BT.shape[1])):",
        "for t in reversed(range(values_BT.shape[1] - 1)):",
        "the longest response loses its last token, and with it its score",
        GAE_TESTS,
    ),
    Mutant(
        "gae",
        ALGORITHM,
        "else advantages_BT + experience.values_BT",
        "else self.normalised(advantages_BT, mask_BT) + experience.values_BT",
        "the critic learns whitened returns",
        STEP_TESTS,
    ),
    Mutant(
        "clip",
        LOSS,
        "loss_BT = torch.maximum(plain_BT, near_BT)",
        "loss_BT = torch.minimum(plain_BT, near_BT)",
        "the clip is on the wrong side",
        LOSS_TESTS,
    ),
    Mutant("clip", LOSS, "1 + (clip if clip_high is None else clip_high)", "1 + clip", "clip_high is not read", LOSS_TESTS),
    Mutant(
        "clip",
        LOSS,
        "torch.where(advantages_BT < 0, -advantages_BT * dual_clip",
        "torch.where(advantages_BT > 0, -advantages_BT * dual_clip",
        "the dual clip bounds good tokens",
        LOSS_TESTS,
    ),
    Mutant(
        "clip",
        LOSS,
        "0.5 * torch.maximum(plain_BT, clipped_BT)",
        "0.5 * torch.minimum(plain_BT, clipped_BT)",
        "the value clip lets go instead of holding",
        LOSS_TESTS,
    ),
    Mutant("clip", LOSS, ".clamp(max=maximum).detach()", ".detach()", "importance weights are not truncated", LOSS_TESTS),
    Mutant("clip", LOSS, ".clamp(max=maximum).detach()", ".clamp(max=maximum)", "importance weights get a gradient", LOSS_TESTS),
    Mutant(
        "clip",
        REWARDS,
        "scores_B.clamp(max=replacement)",
        "torch.full_like(scores_B, replacement)",
        "a bad answer gains by running into the token limit",
        REWARD_TESTS,
    ),
    Mutant(
        "clip",
        SHAPING,
        "clip_scores(scores_B / scale_of(config, moments), config.clip)",
        "clip_scores(scores_B, config.clip) / scale_of(config, moments)",
        "scores are clipped before they are scaled",
        SHAPING_TESTS,
    ),
)
