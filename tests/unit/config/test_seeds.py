"""Seeds that some generator of a run would refuse, up to hours after its start, are refused before it."""

from __future__ import annotations

import numpy as np
import pytest

from app.config.loading import load_recipe
from app.data.prompt_stream import PromptStream
from app.errors import ConfigError
from app.evaluation_statistics import mean_interval
from app.experience import Prompt
from app.workers.actor_critic import minibatch_rows


@pytest.mark.parametrize("key", ["run.seed", "evaluation.seed"])
@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_cannot_be_used_is_refused(key: str, seed: int) -> None:
    with pytest.raises(ConfigError, match=rf"--{key}: {key} = {seed}: input should be (greater than or equal to 0|less than 4294967296)"):
        load_recipe(None, [f"--{key}={seed}"])


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_every_other_seed_can_be_used(seed: int) -> None:
    recipe = load_recipe(None, [f"--run.seed={seed}", f"--evaluation.seed={seed}"])
    assert recipe.run.seed == recipe.evaluation.seed == seed
    stream = PromptStream.over([Prompt(str(number), "", np.array([1], np.int32)) for number in range(3)])
    assert len(stream.take(10**6, 2, seed=seed)) == 2
    assert sum(map(len, minibatch_rows(4, 2, seed=seed + 10**6, epoch=99))) == 4
    assert mean_interval(np.array([1.0, 2.0]), resamples=100, seed=seed).mean == 1.5
