"""The mathematics: pure torch functions, with no configuration, no Ray and no I/O. What is named here is the public surface."""

from app.numerics.advantages import generalized_advantages
from app.numerics.kl import k1, k3
from app.numerics.logprobs import entropy, gather_response, label_logprobs, token_logprobs
from app.numerics.masked import masked_max_abs, masked_mean, masked_sum, masked_variance, whiten, zero_masked
from app.numerics.policy_loss import ClippedLoss, clipped_policy_loss, clipped_value_loss, ratios, truncated_importance
from app.numerics.preference import RankedPairs, group_bradley_terry_loss, pair_bradley_terry_loss, ranked_pairs
from app.numerics.ranking import ranking_metrics, ranking_sums
from app.numerics.rewards import last_true, shape_scores, token_rewards

__all__ = [
    "ClippedLoss",
    "RankedPairs",
    "clipped_policy_loss",
    "clipped_value_loss",
    "entropy",
    "gather_response",
    "generalized_advantages",
    "group_bradley_terry_loss",
    "k1",
    "k3",
    "label_logprobs",
    "last_true",
    "masked_max_abs",
    "masked_mean",
    "masked_sum",
    "masked_variance",
    "pair_bradley_terry_loss",
    "ranked_pairs",
    "ranking_metrics",
    "ranking_sums",
    "ratios",
    "shape_scores",
    "token_logprobs",
    "token_rewards",
    "truncated_importance",
    "whiten",
    "zero_masked",
]
