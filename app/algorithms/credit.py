"""What every algorithm's credit step starts from, and the metrics that describe its result."""

from __future__ import annotations

from dataclasses import replace

import torch

from app.errors import NonFiniteError
from app.experience import Experience
from app.numerics.kl import k1
from app.numerics.masked import masked_max_abs, masked_mean, masked_sum, masked_variance, zero_masked


def mask_failed_rows(experience: Experience) -> Experience:
    """The same batch with mask_BT all False, and every [B, T] tensor 0, in rows whose score is NaN.

    Such a row then counts nowhere: no policy or value gradient, no part in whitening, none in the token totals.
    """
    scored_B = ~experience.scores_B.isnan()
    mask_BT = experience.mask_BT & scored_B[:, None]
    return replace(
        experience,
        tokens=replace(experience.tokens, mask_BT=mask_BT),
        behaviour_BT=zero_masked(experience.behaviour_BT, mask_BT),
        proximal_BT=zero_masked(experience.proximal_BT, mask_BT),
        reference_BT=zero_masked(experience.reference_BT, mask_BT),
        values_BT=None if experience.values_BT is None else zero_masked(experience.values_BT, mask_BT),
    )


def check_finite(experience: Experience) -> None:
    """Raise NonFiniteError, naming the tensor and a row, if anything that the update would read is NaN or infinite.

    Called after `mask_failed_rows`. One bad token would spread over the whole batch through whitening.
    """
    mask_BT = experience.mask_BT
    used_B = mask_BT.any(dim=1)
    tensors = {
        "scores": zero_masked(experience.scores_B, used_B)[:, None],
        "behaviour log-probs": experience.behaviour_BT,
        "proximal log-probs": experience.proximal_BT,
        "reference log-probs": experience.reference_BT,
    }
    if experience.values_BT is not None:
        tensors["values"] = experience.values_BT
    for name, x in tensors.items():
        bad_B = ~x.isfinite().all(dim=1)
        if bad_B.any():
            rows = bad_B.nonzero().flatten().tolist()
            raise NonFiniteError(
                f"{name} of rollouts {rows[:8]} (of {len(bad_B)}) are NaN or infinite: "
                "lower the learning rate or raise model.precision, and look at the last steps' gradient norms"
            )


def credit_metrics(experience: Experience) -> dict[str, float]:
    """What a credited batch looks like. Rows whose score failed count only in `failed_scores`.

    score: mean of the shaped scores. reward: mean over sequences of the summed rewards (score - kl_coef * KL where the penalty
    is part of the reward). kl: mean over sequences of the summed k1 against the reference, nats; kl_per_token: the same per
    response token. kl_coef: the penalty's weight. advantage_mean, advantage_std: before whitening, per token.
    response_length: mean tokens. max_logprob_mismatch, logprob_mismatch: largest and mean |proximal - behaviour|.
    failed_scores: share of the batch's rows.
    With a critic also value_mean, return_mean: per token; explained_variance: 1 - Var(return - old value) / Var(return) over
    tokens, 0 where returns do not vary. Raises ValueError for an experience that was not credited.
    """
    if experience.rewards_BT is None or experience.returns_BT is None:
        raise ValueError("experience has no rewards: call the algorithm's credit() first")
    mask_BT = experience.mask_BT
    used_B = mask_BT.any(dim=1)
    num_sequences = used_B.sum().clamp(min=1)
    kl_BT = k1(experience.proximal_BT, experience.reference_BT)
    mismatch_BT = experience.proximal_BT - experience.behaviour_BT
    # The advantages that `experience` holds may be whitened; these are not.
    advantages_BT = experience.returns_BT if experience.values_BT is None else experience.returns_BT - experience.values_BT
    advantage_variance = masked_variance(advantages_BT, mask_BT)
    metrics: dict[str, torch.Tensor | float] = {
        "score": masked_mean(experience.scores_B, used_B),
        "reward": masked_sum(experience.rewards_BT, mask_BT) / num_sequences,
        "kl": masked_sum(kl_BT, mask_BT) / num_sequences,
        "kl_per_token": masked_mean(kl_BT, mask_BT),
        "kl_coef": experience.kl_coef,
        "advantage_mean": masked_mean(advantages_BT, mask_BT),
        "advantage_std": advantage_variance.sqrt(),
        "response_length": mask_BT.sum() / num_sequences,
        "max_logprob_mismatch": masked_max_abs(mismatch_BT, mask_BT),
        "logprob_mismatch": masked_mean(mismatch_BT.abs(), mask_BT),
        "failed_scores": experience.scores_B.isnan().float().mean(),
    }
    if experience.values_BT is not None:
        return_variance = masked_variance(experience.returns_BT, mask_BT)
        metrics |= {
            "value_mean": masked_mean(experience.values_BT, mask_BT),
            "return_mean": masked_mean(experience.returns_BT, mask_BT),
            "explained_variance": torch.where(return_variance > 0, 1 - advantage_variance / return_variance, 0.0),
        }
    return {name: float(x) for name, x in metrics.items()}
