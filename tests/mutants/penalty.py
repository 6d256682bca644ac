"""The penalty on the distance from the reference."""

from __future__ import annotations

from tests.mutants.files import ALGORITHM, KL, KL_TESTS, LOOP, LOOP_TESTS, STEP_TESTS, SURROGATE, SURROGATE_TESTS
from tests.mutants.mutant import Mutant

MUTANTS = (
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
)
