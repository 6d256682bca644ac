"""Which prompts a PPO step uses: a function of seed and cursor only, so a resumed run goes on with the same prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from app.experience import Prompt


def take_prompts(prompts: Sequence[Prompt], cursor: int, count: int, *, seed: int) -> list[Prompt]:
    """`count` prompts from position `cursor` of an endless stream that runs through all prompts in a fresh order each pass."""
    batch: list[Prompt] = []
    while len(batch) < count:
        epoch, offset = divmod(cursor + len(batch), len(prompts))
        order = np.random.default_rng([seed, epoch]).permutation(len(prompts))
        batch.extend(prompts[i] for i in order[offset : offset + count - len(batch)])
    return batch
