"""The critic: a head on the policy's trunk, and the steps in which it learns alone."""

from __future__ import annotations

from tests.mutants.files import LOOP, LOOP_TESTS
from tests.mutants.mutant import Mutant

POLICY, LOSSES = "app/models/policy.py", "app/workers/engine_losses.py"
POLICY_TESTS, LOSSES_TESTS = ("tests/unit/models/test_policy.py",), ("tests/unit/workers/test_engine_losses.py",)

MUTANTS = (
    Mutant(
        "critic",
        POLICY,
        "self.value_head(picked_NH)",
        "self.value_head(picked_NH.detach())",
        "the trunk learns nothing of values",
        (*POLICY_TESTS, "tests/oracle/test_literal_mix.py"),
    ),
    Mutant(
        "critic",
        "app/models/heads.py",
        "return self.outer(inner.relu())",
        "return self.outer(inner)",
        "the value head is linear",
        POLICY_TESTS,
    ),
    Mutant(
        "critic",
        LOSSES,
        "loss.policy + loss.value if policy_learns else loss.value",
        "loss.policy if policy_learns else loss.value",
        "a value head learns during the warm-up alone",
        LOSSES_TESTS,
    ),
    Mutant(
        "critic",
        "app/workers/pushed_policy.py",
        "return name.startswith(LANGUAGE_MODEL) and trained in",
        "return trained in",
        "the value head is pushed to the engines and exported",
        ("tests/unit/workers/test_pushed_policy.py",),
    ),
    Mutant(
        "critic",
        LOSSES,
        'losses = {"policy": loss.policy} if policy_learns else {}',
        'losses = {"policy": loss.policy}',
        "the policy moves while its critic warms up",
        LOSSES_TESTS,
    ),
    Mutant(
        "critic",
        POLICY,
        "torch.set_grad_enabled(torch.is_grad_enabled() and not frozen)",
        "torch.set_grad_enabled(torch.is_grad_enabled())",
        "the trunk moves while its value head warms up",
        POLICY_TESTS,
    ),
    Mutant(
        "critic",
        "app/config/ppo.py",
        "return step >= self.critic_warmup_steps",
        "return step > self.critic_warmup_steps",
        "the warm-up is a step too long",
        LOOP_TESTS,
    ),
    Mutant(
        "critic",
        LOOP,
        "version=self.version + int(moved)",
        "version=self.version + 1",
        "weights that have not moved are called newer",
        LOOP_TESTS,
    ),
)
