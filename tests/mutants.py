"""Mistakes of the kind that training survives in silence, each with the quick tests that must notice it.

`bench/mutation.py` plants them one at a time in a copy of the tree. Each `old` stands exactly once in its file.
"""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """Replace `old` by `new` in `file`; `breaks` says what is then wrong; `tests` (files or folders) must fail."""

    kind: str
    file: str
    old: str
    new: str
    breaks: str
    tests: tuple[str, ...]


ADVANTAGES, GROUPS, KL = "app/numerics/advantages.py", "app/numerics/groups.py", "app/numerics/kl.py"
LOGPROBS, MASKED, LOSS = "app/numerics/logprobs.py", "app/numerics/masked.py", "app/numerics/policy_loss.py"
REWARDS, MOMENTS = "app/numerics/rewards.py", "app/numerics/moments.py"
ALGORITHM, CREDIT, SURROGATE, SHAPING = (f"app/algorithms/{name}.py" for name in ("algorithm", "credit", "surrogate", "shaping"))
PPO, LOOP, LEARNER, ROLLOUT, PUSH = (
    "app/algorithms/ppo.py",
    "app/stages/actor_learner.py",
    "app/workers/learner.py",
    "app/workers/rollout.py",
    "app/workers/weight_transfer.py",
)

GAE_TESTS = ("tests/oracle/test_literal_advantages.py", "tests/unit/numerics/test_advantages.py")
GROUP_TESTS = ("tests/oracle/test_literal_groups.py",)
KL_TESTS = ("tests/unit/numerics/test_kl.py",)
LOGPROB_TESTS = ("tests/oracle/test_literal_logprobs.py", "tests/unit/numerics/test_logprobs.py")
LOOP_TESTS = ("tests/unit/stages/test_actor_learner.py",)
LOSS_TESTS = ("tests/oracle/test_literal_losses.py", "tests/unit/numerics/test_policy_loss.py")
MASKED_TESTS = ("tests/unit/numerics/test_masked.py",)
ENGINE = "app/workers/rollout_engine.py"
PROPERTIES = ("tests/unit/algorithms/test_properties.py",)
REWARD_TESTS = ("tests/oracle/test_literal_rewards.py",)
SHAPING_TESTS = ("tests/unit/algorithms/test_shaping.py",)
STEP_TESTS = ("tests/oracle/test_literal_step.py",)
SURROGATE_TESTS = ("tests/unit/algorithms/test_surrogate.py",)
METRIC_TESTS = ("tests/unit/algorithms/test_credit_metrics.py",)

MUTANTS = (
    # masks
    Mutant(
        "mask",
        ADVANTAGES,
        "next_value_B = torch.where(mask_BT[:, t], values_BT[:, t], next_value_B)",
        "next_value_B = values_BT[:, t]",
        "values on padding are bootstrapped from",
        GAE_TESTS,
    ),
    Mutant(
        "mask",
        LOSS,
        "loss=masked_sum(loss_BT, mask_BT) / total_tokens",
        "loss=loss_BT.sum() / total_tokens",
        "padding is part of the loss",
        LOSS_TESTS,
    ),
    Mutant(
        "mask",
        LOSS,
        "return zero_masked(logprobs_BT - proximal_BT, mask_BT).exp()",
        "return (logprobs_BT - proximal_BT).exp()",
        "a masked infinity makes the gradient NaN",
        LOSS_TESTS,
    ),
    Mutant(
        "mask",
        CREDIT,
        "mask_BT = experience.mask_BT & scored_B[:, None]",
        "mask_BT = experience.mask_BT",
        "rows whose score failed are learnt from",
        PROPERTIES,
    ),
    Mutant("mask", MASKED, "return zero_masked(scaled, mask)", "return scaled", "whitening gives padding an advantage", MASKED_TESTS),
    Mutant(
        "mask",
        SURROGATE,
        "current_BT, reference_BT = zero_masked(logprobs_BT, mask_BT), zero_masked(minibatch.reference_BT, mask_BT)",
        "current_BT, reference_BT = logprobs_BT, minibatch.reference_BT",
        "a masked NaN of the reference reaches the gradient through the KL loss",
        PROPERTIES,
    ),
    Mutant(
        "mask",
        GROUPS,
        "same_BB = (groups_B[:, None] == groups_B[None, :]) & valid_B[:, None] & valid_B[None, :]",
        "same_BB = groups_B[:, None] == groups_B[None, :]",
        "failed rows count as members of their group",
        GROUP_TESTS,
    ),
    # shifts
    Mutant(
        "shift",
        LOGPROBS,
        "prompt_lengths_B[:, None] - 1 + offsets_T",
        "prompt_lengths_B[:, None] + offsets_T",
        "log-probs and values are those of the next token",
        LOGPROB_TESTS,
    ),
    Mutant(
        "shift",
        LOGPROBS,
        "following_BS = torch.cat([ids_BS[:, 1:], torch.zeros_like(ids_BS[:, :1])], dim=1)",
        "following_BS = ids_BS",
        "every token is judged by the logits behind it",
        LOGPROB_TESTS,
    ),
    Mutant(
        "shift",
        "app/models/policy.py",
        "return prompt_lengths_B[:, None] - 1 + torch.minimum(steps_T, last_B1)",
        "return prompt_lengths_B[:, None] - 2 + torch.minimum(steps_T, last_B1)",
        "the learner trains on the tokens one place to the left",
        ("tests/oracle/test_literal_update.py",),
    ),
    Mutant(
        "shift",
        REWARDS,
        "return mask_BT & (behind_BT == 1)",
        "return mask_BT & (behind_BT == 2)",
        "the score is paid one token before the end token",
        REWARD_TESTS,
    ),
    Mutant(
        "shift",
        "app/experience.py",
        "return per_token[len(self.prompt.ids) - 1 :]",
        "return per_token[len(self.prompt.ids) :]",
        "reference log-probs are one token late",
        LOOP_TESTS,
    ),
    # signs
    Mutant(
        "sign",
        REWARDS,
        "return torch.where(mask_BT, score_BT - penalty_BT, 0.0)",
        "return torch.where(mask_BT, score_BT + penalty_BT, 0.0)",
        "moving away from the reference pays",
        REWARD_TESTS,
    ),
    Mutant(
        "sign", LOSS, "plain_BT = -advantages_BT * ratio_BT", "plain_BT = advantages_BT * ratio_BT", "good tokens become rarer", LOSS_TESTS
    ),
    Mutant(
        "sign",
        SURROGATE,
        "loss = loss - config.entropy_coef * mean(outputs.entropy_BT)",
        "loss = loss + config.entropy_coef * mean(outputs.entropy_BT)",
        "the entropy bonus is a penalty",
        SURROGATE_TESTS,
    ),
    Mutant("sign", KL, "    return logprobs_p - logprobs_q", "    return logprobs_q - logprobs_p", "KL is of the wrong sign", REWARD_TESTS),
    Mutant(
        "sign",
        GROUPS,
        "return zero_masked(x_B - group_means(x_B, groups_B, valid_B), valid_B)",
        "return zero_masked(group_means(x_B, groups_B, valid_B) - x_B, valid_B)",
        "the worst of a group is reinforced",
        GROUP_TESTS,
    ),
    Mutant("sign", SHAPING, ") - length_penalties(", ") + length_penalties(", "length is rewarded", SHAPING_TESTS),
    Mutant(
        "sign",
        LOGPROBS,
        "grad_logits_BSV[:, part] = -outer * logprobs.exp()",
        "grad_logits_BSV[:, part] = outer * logprobs.exp()",
        "the entropy's gradient points the other way",
        LOGPROB_TESTS,
    ),
    Mutant(
        "sign",
        REWARDS,
        "torch.where(has_baseline_B, scores_B - baselines_B, scores_B)",
        "torch.where(has_baseline_B, baselines_B - scores_B, scores_B)",
        "answers worse than the reference pay",
        SHAPING_TESTS,
    ),
    # denominators
    Mutant(
        "denominator",
        LOSS,
        "loss=masked_sum(loss_BT, mask_BT) / total_tokens",
        "loss=masked_sum(loss_BT, mask_BT) / mask_BT.sum().clamp(min=1)",
        "every micro-batch is a mean of its own: results depend on its size and on the number of ranks",
        PROPERTIES,
    ),
    Mutant(
        "denominator",
        LOSS,
        "(max(1, total_sequences) * lengths_B1)",
        "(max(1, len(mask_BT)) * lengths_B1)",
        "sequences are counted by micro-batch",
        PROPERTIES,
    ),
    Mutant(
        "denominator",
        MASKED,
        "return masked_sum(x, mask) / mask.sum().clamp(min=1)",
        "return masked_sum(x, mask) / mask.numel()",
        "means shrink with the padding",
        MASKED_TESTS,
    ),
    Mutant(
        "denominator",
        GROUPS,
        "* count_B / (count_B - 1).clamp(min=1)",
        "* count_B / count_B.clamp(min=1)",
        "the baseline holds the sample itself",
        GROUP_TESTS,
    ),
    Mutant(
        "denominator",
        GROUPS,
        "/ (together_BB.sum(1) - 1).clamp(min=1)",
        "/ together_BB.sum(1).clamp(min=1)",
        "groups are divided by another deviation",
        GROUP_TESTS,
    ),
    Mutant(
        "denominator",
        CREDIT,
        '"kl": masked_sum(kl_BT, mask_BT) / num_sequences',
        '"kl": masked_mean(kl_BT, mask_BT)',
        "the controller compares a KL per token with a target per sequence",
        LOOP_TESTS,
    ),
    Mutant(
        "denominator",
        MOMENTS,
        "* self.count * count / total",
        "* count / total",
        "the running scale drifts with the batch size",
        ("tests/unit/numerics/test_moments.py",),
    ),
    # GAE boundary
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
    # clips
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
    # KL
    Mutant(
        "kl", KL, "return torch.expm1(log_ratio) - log_ratio", "return torch.expm1(log_ratio) + log_ratio", "k3 may be negative", KL_TESTS
    ),
    Mutant(
        "kl", KL, "return 0.5 * (logprobs_p - logprobs_q) ** 2", "return (logprobs_p - logprobs_q) ** 2", "k2 pulls twice as hard", KL_TESTS
    ),
    Mutant("kl", KL, "min(max(kl / target - 1, -0.2), 0.2)", "kl / target - 1", "one far batch throws the coefficient off", KL_TESTS),
    Mutant("kl", KL, "error * sequences / horizon", "error / horizon", "the horizon counts updates", KL_TESTS),
    Mutant(
        "kl",
        ALGORITHM,
        "kl_coef=kl_coef if self.surrogate.kl_in_reward else 0.0",
        "kl_coef=kl_coef",
        "the penalty is paid in the reward and in the loss",
        STEP_TESTS,
    ),
    Mutant(
        "kl",
        SURROGATE,
        "return weights_BT * KL_FORMS[form]",
        "return KL_FORMS[form]",
        "the KL loss forgets which policy sampled",
        SURROGATE_TESTS,
    ),
    Mutant("kl", SURROGATE, "loss + minibatch.kl_coef * kl_loss", "loss + kl_loss", "the KL loss has no coefficient", SURROGATE_TESTS),
    Mutant(
        "kl",
        LOOP,
        "kl_coef = config.kl.after(kl_coef,",
        "kl_coef = kl_coef if kl_coef else config.kl.after(kl_coef,",
        "the adaptive coefficient never moves",
        LOOP_TESTS,
    ),
    # weight version and agreement of engine and learner
    Mutant(
        "version",
        LOOP,
        "if version - oldest > max_lag:",
        "if version - oldest > max_lag + 1:",
        "rollouts may be older than allowed",
        LOOP_TESTS,
    ),
    Mutant(
        "version",
        LOOP,
        "oldest = min(rollout.policy_version",
        "oldest = max(rollout.policy_version",
        "one fresh rollout hides the stale ones",
        LOOP_TESTS,
    ),
    Mutant(
        "version",
        LOOP,
        "push = parts.publisher.publish(state.version)",
        "push = parts.publisher.publish(state.version - 1)",
        "weights are labelled with the version before",
        LOOP_TESTS,
    ),
    Mutant(
        "version",
        LOOP,
        "(experience.proximal_BT - experience.behaviour_BT).abs().max()",
        "(experience.proximal_BT - experience.proximal_BT).abs().max()",
        "an engine with other weights goes unnoticed",
        LOOP_TESTS,
    ),
    Mutant(
        "version",
        ENGINE,
        "versions[span.start : span.end] = int(span.version)",
        "versions[:] = int(span.version)",
        "tokens of old weights claim to be of the newest",
        ("tests/unit/workers/test_rollout_engine.py",),
    ),
    Mutant(
        "version",
        ROLLOUT,
        "place = share.places[index]",
        "place = share.places[-1 - index]",
        "responses of one engine stand at each other's prompts",
        ("tests/unit/workers/test_rollout_pool.py",),
    ),
    Mutant(
        "version",
        PUSH,
        "if not mismatch <= self._limit:",
        "if mismatch > self._limit:",
        "an engine that answers NaN passes",
        ("tests/unit/workers/test_weight_transfer.py",),
    ),
    Mutant(
        "version",
        LEARNER,
        "if not mismatch <= limit:",
        "if mismatch > 10 * limit:",
        "dropout in the learner goes unnoticed",
        ("tests/unit/workers/test_learner.py",),
    ),
    Mutant(
        "version",
        SURROGATE,
        "return truncated_importance(numerator_BT, minibatch.behaviour_BT,",
        "return truncated_importance(minibatch.behaviour_BT, numerator_BT,",
        "samples of older policies are weighted the wrong way",
        SURROGATE_TESTS,
    ),
)
