"""Which weights sampled a token, and whether engine and learner agree."""

from __future__ import annotations

from tests.mutants.files import ENGINE, LEARNER, LONG_TAIL_TESTS, LOOP, LOOP_TESTS, PUSH, SAMPLING, STREAM, SURROGATE, SURROGATE_TESTS
from tests.mutants.mutant import Mutant

MUTANTS = (
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
        STREAM,
        "config.max_lag - (self._carry_over > 0)",
        "config.max_lag",
        "carried-over rollouts are older than allowed",
        LONG_TAIL_TESTS,
    ),
    Mutant(
        "version",
        STREAM,
        "[*self._drawn_before, *range(self._drawn, drawn)]",
        "[*range(drawn - needed, drawn)]",
        "a resumed run forgets the prompts that were carried over",
        LONG_TAIL_TESTS,
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
        ENGINE,
        "return bool(self._flights) and not self._updating",
        "return bool(self._flights)",
        "tokens are sampled while new weights come in",
        ("tests/unit/workers/test_engine_updates.py",),
    ),
    Mutant(
        "version",
        ENGINE,
        'cache_salt=f"{call.number}.{self._version}"',
        'cache_salt=f"{call.number}"',
        "prefixes outlive the weights that computed them",
        ("tests/unit/workers/test_engine_updates.py",),
    ),
    Mutant(
        "version",
        SAMPLING,
        "places = [share.places[index] for index, _ in answers]",
        "places = [share.places[-1 - index] for index, _ in answers]",
        "responses of one engine stand at each other's prompts",
        ("tests/unit/workers/test_rollout_pool.py",),
    ),
    Mutant(
        "version",
        PUSH,
        "if not mismatch <= self._limit:",
        "if mismatch > self._limit:",
        "an engine that answers NaN passes",
        ("tests/unit/workers/test_weight_publisher.py",),
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
