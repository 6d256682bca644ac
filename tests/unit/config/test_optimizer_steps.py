"""How many steps each optimizer of PPO takes, and what is told of a warm-up that they are too few for."""

from __future__ import annotations

import pytest

from app.config.loading import load_recipe

LENGTHS = ["--ppo.steps=12", "--ppo.epochs=1", "--ppo.critic_warmup_steps=5"]


@pytest.mark.parametrize(("critic_model", "steps"), [("reward_model", 7), ("value_head", 12)])
def test_an_optimizer_that_a_value_head_shares_takes_the_steps_of_the_warm_up_too(critic_model: str, steps: int) -> None:
    choice = [*LENGTHS, f"--ppo.critic_model={critic_model}"]
    ppo = load_recipe(None, [*choice, f"--ppo.policy.warmup_steps={steps}"]).ppo
    assert (ppo.optimizer_steps(of_policy=True), ppo.optimizer_steps(of_policy=False)) == (steps, 12)
    assert ppo.doubts() == []
    (told,) = load_recipe(None, [*choice, f"--ppo.policy.warmup_steps={steps + 1}"]).ppo.doubts()
    assert told.startswith(f"ppo.policy.warmup_steps = {steps + 1} is more than the {steps} optimizer steps")
