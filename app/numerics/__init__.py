"""The mathematics: pure torch functions, with no configuration, no Ray and no I/O. What is named here is the public surface."""

from app.numerics.advantages import generalized_advantages
from app.numerics.groups import centred, group_means, leave_one_out, standardised
from app.numerics.kl import adapted_coefficient, k1, k2, k3
from app.numerics.logprobs import entropy, gather_response, label_logprobs, token_logprobs
from app.numerics.masked import masked_max_abs, masked_mean, masked_sum, masked_variance, whiten, zero_masked
from app.numerics.moments import Moments
from app.numerics.policy_loss import (
    ClippedLoss,
    clipped_policy_loss,
    clipped_value_loss,
    ratios,
    sequence_weights,
    truncated_importance,
)
from app.numerics.preference import RankedPairs, group_bradley_terry_loss, pair_bradley_terry_loss, ranked_pairs
from app.numerics.ranking import ranking_metrics, ranking_sums
from app.numerics.rewards import above_baseline, clip_scores, last_true, length_penalties, penalise_missing_eos, token_rewards

__all__ = [
    "ClippedLoss",
    "Moments",
    "RankedPairs",
    "above_baseline",
    "adapted_coefficient",
    "centred",
    "clip_scores",
    "clipped_policy_loss",
    "clipped_value_loss",
    "entropy",
    "gather_response",
    "generalized_advantages",
    "group_bradley_terry_loss",
    "group_means",
    "k1",
    "k2",
    "k3",
    "label_logprobs",
    "last_true",
    "leave_one_out",
    "length_penalties",
    "masked_max_abs",
    "masked_mean",
    "masked_sum",
    "masked_variance",
    "pair_bradley_terry_loss",
    "penalise_missing_eos",
    "ranked_pairs",
    "ranking_metrics",
    "ranking_sums",
    "ratios",
    "sequence_weights",
    "standardised",
    "token_logprobs",
    "token_rewards",
    "truncated_importance",
    "whiten",
    "zero_masked",
]
