"""Adapters on their way into the engines, and what of a policy travels how often."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

ADAPTERS, PUSHED = "app/models/adapters.py", "app/workers/pushed_policy.py"
ADAPTER_TESTS, PUSHED_TESTS = ("tests/unit/models/test_adapters.py",), ("tests/unit/workers/test_pushed_policy.py",)

MUTANTS = (
    Mutant(
        "adapter",
        ADAPTERS,
        "delta = scale * (parts[HIGH].float() @ parts[LOW].float())",
        "delta = parts[HIGH].float() @ parts[LOW].float()",
        "engines add adapters at another strength than the learner",
        ADAPTER_TESTS,
    ),
    Mutant(
        "adapter",
        ADAPTERS,
        "return config.alpha / config.rank",
        "return config.alpha",
        "the scale is not divided by the rank",
        ADAPTER_TESTS,
    ),
    Mutant(
        "adapter",
        PUSHED,
        "return PushedPolicy(trained, self._frozen, self._scale, first)",
        "return PushedPolicy(self._frozen if trained.buckets else trained, self._frozen, self._scale, first)",
        "what is frozen is sent in place of the adapters",
        PUSHED_TESTS,
    ),
    Mutant(
        "adapter",
        PUSHED,
        "        if self._frozen is None:\n",
        "        if self._scale is not None:\n",
        "the weights below adapters travel with every push",
        PUSHED_TESTS,
    ),
    Mutant(
        "adapter",
        PUSHED,
        "return weights if self._scale is None else merged_weights(weights, self._scale)",
        "return weights",
        "adapters are exported beside the weights that they belong to",
        PUSHED_TESTS,
    ),
    Mutant(
        "adapter",
        PUSHED,
        "require_intact(buckets, [*self.trained.checksums, *self.frozen.checksums], version)",
        "require_intact(buckets[: len(self.trained.buckets)], self.trained.checksums, version)",
        "weights below adapters may arrive otherwise than they were sent",
        PUSHED_TESTS,
    ),
    Mutant(
        "adapter",
        "app/workers/ppo_checkpoint.py",
        'write_json(checkpoint / POLICY / ADAPTERS, {"scale": scale_of(lora)})',
        'write_json(checkpoint / POLICY / ADAPTERS, {"scale": 1.0})',
        "a checkpoint's policy is exported with adapters of another strength",
        PUSHED_TESTS,
    ),
)
