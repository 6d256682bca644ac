"""The loss on other text that is mixed into the policy's."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

MIX, MIX_TESTS = "app/workers/pretraining.py", ("tests/oracle/test_literal_mix.py",)

MUTANTS = (
    Mutant(
        "pretraining",
        MIX,
        "sum(int(row.loss_mask.sum()) for row in rows)",
        "sum(int(rows[i].loss_mask.sum()) for batch in mine for i in batch)",
        "every rank divides by its own tokens",
        MIX_TESTS,
    ),
    Mutant("pretraining", MIX, ".masked_fill(~targets_BR.to(device), 0.0)", "", "what is no target is learnt", MIX_TESTS),
    Mutant("pretraining", MIX, "row.loss_mask[1:]", "row.loss_mask[:-1]", "targets are a token late", MIX_TESTS),
    Mutant("pretraining", MIX, "step_rows(step,", "step_rows(0,", "every step learns the same texts", MIX_TESTS),
)
