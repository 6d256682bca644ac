"""Which models a recipe asks to be served."""

from __future__ import annotations

from app.config.ppo import ScoringConfig
from app.config.recipe import Recipe
from app.config.serving import BatchingConfig, ServedModelConfig
from app.errors import ConfigError

REWARD, REFERENCE = "reward", "reference"
"""Names of the models that PPO scores with."""


def ppo_models(config: ScoringConfig, *, reward_path: str, reference_path: str, temperature: float) -> dict[str, ServedModelConfig]:
    """The two models of a PPO run. Log-probs are those of the reference's logits divided by `temperature`."""
    batching = BatchingConfig(max_batch_tokens=config.max_batch_tokens, wait_seconds=config.batch_wait_seconds)
    reward = ServedModelConfig(
        path=reward_path, kind="reward", workers=config.reward, batching=batching, timeout_seconds=config.timeout_seconds
    )
    reference = reward.model_copy(
        update={"path": reference_path, "kind": "reference", "workers": config.reference, "temperature": temperature}
    )
    return {REWARD: reward, REFERENCE: reference}


def named_models(recipe: Recipe) -> dict[str, ServedModelConfig]:
    """What `corral serve` scores with: `serving.models`; where a recipe names none, and no model to chat with, its reward model and
    the model it starts from. Raises ConfigError where there is no model at all."""
    if recipe.serving.models or recipe.serving.chat:
        return recipe.serving.models
    if recipe.reward.path is None:
        raise ConfigError("no model to serve: give --model NAME=FOLDER, or a recipe with serving.models or with reward.path and model.path")
    return ppo_models(
        recipe.scoring, reward_path=recipe.reward.path, reference_path=recipe.model.path, temperature=recipe.rollout.temperature
    )
