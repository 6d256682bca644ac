"""What passes through policy and critic of a PPO learner."""

from __future__ import annotations

from dataclasses import dataclass, replace

from app.config.recipe import Recipe
from app.planning.memory import NOTHING, Batch, Trained, activations, largest_pass, total
from app.planning.shapes import shape_of
from app.planning.trained import trained_model, value_head


@dataclass(frozen=True)
class LearnerModels:
    """The learner's models, a value head as a part of the policy, none of unknown size.

    learning: at the passes that take most while it learns; judging: with the rollouts that log-probs and values are computed of first.
    """

    learning: tuple[Trained, ...]
    judging: tuple[Trained, ...]


def learner_models(recipe: Recipe, width: int) -> LearnerModels:
    """Policy and critic, or the policy alone, of one rank. width: bytes per number."""
    ppo = recipe.ppo
    policy, critic = shape_of(recipe.model.path), shape_of(recipe.reward.path or recipe.model.path)
    batch, others = _rollouts(recipe)
    held = others if ppo.reuse_forward else NOTHING
    judging, learning = [], []
    if policy is not None:
        judging.append(
            _with_head(trained_model(policy, ppo, policy.parameters, batch, held, 2 if ppo.algorithm.entropy_coef else 1), recipe)
        )
        alternatives = [judging[0]]
        if ppo.pretraining.coef:  # its passes come first, while all of the rollouts' are still open
            whole = Batch(ppo.rows_per_step, _length(recipe), ppo.rows_per_step * recipe.rollout.max_new_tokens)
            texts = replace(judging[0], batch=_texts(recipe), held=whole if ppo.reuse_forward else NOTHING, logit_gradients=1)
            alternatives.append(texts)
        learning.append(max(alternatives, key=lambda model: total(activations(model, ppo.deepspeed, width))))
    if critic is not None and ppo.has_critic_model:
        values = Trained(critic, critic.trunk, critic.trunk, replace(batch, targets=0), replace(held, targets=0))
        judging.append(values)
        learning.append(values)
    return LearnerModels(tuple(learning), tuple(judging))


def _length(recipe: Recipe) -> int:
    return recipe.data.max_prompt_length + recipe.rollout.max_new_tokens


def _rollouts(recipe: Recipe) -> tuple[Batch, Batch]:
    """The largest forward pass, and what is left of an optimizer step beside it."""
    ppo, answer, length = recipe.ppo, recipe.rollout.max_new_tokens, _length(recipe)
    most = ppo.rows_per_step
    rows, tokens = largest_pass(ppo.micro_batch_size, length, tokens=ppo.micro_batch_tokens, most=most)
    # where tokens are counted, more answers fit beside shorter prompts
    targets = min(rows * tokens, most * answer) if ppo.micro_batch_tokens else rows * answer
    left = most - rows
    return Batch(rows, tokens, targets), Batch(left, length, left * answer)


def _texts(recipe: Recipe) -> Batch:
    """Of ppo.pretraining in one forward pass."""
    ppo, mix = recipe.ppo, recipe.ppo.pretraining
    most = max(1, mix.batch_size // ppo.workers.count)
    rows, length = largest_pass(mix.micro_batch_size, recipe.data.max_length, tokens=ppo.micro_batch_tokens, most=most)
    return Batch(rows, length, rows * (length - 1))


def _with_head(policy: Trained, recipe: Recipe) -> Trained:
    head = value_head(policy.shape) if recipe.ppo.has_value_head else 0
    return replace(policy, parameters=policy.parameters + head, trained=policy.trained + head)
