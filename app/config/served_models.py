"""Which models a recipe asks to be served."""

from __future__ import annotations

from collections.abc import Sequence

from app.config.recipe import Recipe
from app.config.scoring import ScoringConfig
from app.config.serving import BatchingConfig, ServedModelConfig
from app.errors import ConfigError

REWARD, REFERENCE = "reward", "reference"
"""Names of the models that PPO scores with. Further reward models of a mix are called `reward-2`, `reward-3` and so on."""


def reward_names(count: int) -> list[str]:
    """
    >>> reward_names(3)
    ['reward', 'reward-2', 'reward-3']
    """
    return [REWARD, *(f"{REWARD}-{number}" for number in range(2, count + 1))]


def ppo_models(
    config: ScoringConfig, *, reward_paths: Sequence[str], reference_path: str, temperature: float
) -> dict[str, ServedModelConfig]:
    """The reward models of a PPO run, the main one first, and its reference, whose log-probs are those of its logits divided by
    `temperature`."""
    batching = BatchingConfig(max_batch_tokens=config.max_batch_tokens, wait_seconds=config.batch_wait_seconds)
    reward = ServedModelConfig(
        path=reward_paths[0], kind="reward", workers=config.reward, batching=batching, timeout_seconds=config.timeout_seconds
    )
    rewards = {
        name: reward.model_copy(update={"path": path}) for name, path in zip(reward_names(len(reward_paths)), reward_paths, strict=True)
    }
    reference = reward.model_copy(
        update={"path": reference_path, "kind": "reference", "workers": config.reference, "temperature": temperature}
    )
    return {**rewards, REFERENCE: reference}


def named_models(recipe: Recipe) -> dict[str, ServedModelConfig]:
    """What `corral serve` scores with: `serving.models`; where a recipe names none, and no model to chat with, its reward model and
    the model it starts from. Raises ConfigError where there is no model at all."""
    if recipe.serving.models or recipe.serving.chat:
        return recipe.serving.models
    if recipe.reward.path is None:
        raise ConfigError("no model to serve: give --model NAME=FOLDER, or a recipe with serving.models or with reward.path and model.path")
    return ppo_models(
        recipe.scoring, reward_paths=[recipe.reward.path], reference_path=recipe.model.path, temperature=recipe.rollout.temperature
    )
