"""Prompts that a batch leaves to the next one."""

from __future__ import annotations

from tests.mutants.files import LONG_TAIL_TESTS, LOOP, STREAM
from tests.mutants.mutant import Mutant

MUTANTS = (
    Mutant(
        "carried",
        STREAM,
        "spare = self._carry_over if self._submitted < self._config.steps else 0",
        "spare = self._carry_over",
        "prompts of the last batch are sampled and never trained on",
        LONG_TAIL_TESTS,
    ),
    Mutant(
        "carried",
        STREAM,
        "if self._ended.issuperset(self._places(group))",
        "if not self._ended.isdisjoint(self._places(group))",
        "a group is closed before all of its samples have ended",
        LONG_TAIL_TESTS,
    ),
    Mutant(
        "carried",
        STREAM,
        "self._ended.difference_update(places)",
        "self._ended.clear()",
        "samples of groups that stay behind are forgotten",
        LONG_TAIL_TESTS,
    ),
    Mutant(
        "carried",
        STREAM,
        "{source.first + place: source.sampling[place] for place in places}",
        "{place: source.sampling[place] for place in places}",
        "responses of the new batch overwrite those that were carried over",
        LONG_TAIL_TESTS,
    ),
    Mutant("carried", LOOP, "carried=tuple(batch.carried)", "carried=()", "a checkpoint forgets who was carried over", LONG_TAIL_TESTS),
)
