"""Mistakes of the kind that training survives in silence, each with the quick tests that must notice it.

`bench/mutation.py` plants them one at a time in a copy of the tree. Each `old` stands exactly once in its file.
"""

from tests.mutants import adapters, bounds, carried, critic, healing, packing, penalty, places, pretraining, sums, versions
from tests.mutants.mutant import Mutant

__all__ = ["MUTANTS", "Mutant"]
TOPICS = (places, sums, bounds, penalty, versions, critic, pretraining, adapters, packing, carried, healing)
MUTANTS = tuple(mutant for topic in TOPICS for mutant in topic.MUTANTS)
