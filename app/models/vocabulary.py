"""Whether two models read the same token ids."""

from __future__ import annotations

from app.errors import ModelError
from app.models.load import load_tokenizer, seen_from_anywhere


def other_vocabulary(scorer: str, policy: str, *, trust_remote_code: bool = False) -> str | None:
    """The first token of the policy's to which the scorer's tokenizer gives another id, or which it lacks; None where it reads the
    policy's token ids as they are. What the scorer has beyond them, it never sees; nor the padding."""
    if seen_from_anywhere(scorer) == seen_from_anywhere(policy):
        return None
    here, there = (load_tokenizer(seen_from_anywhere(path), trust_remote_code) for path in (policy, scorer))
    known = there.get_vocab()
    differing = [(index, token) for token, index in here.get_vocab().items() if known.get(token) != index and token != here.pad_token]
    if not differing:
        return None
    index, token = min(differing)
    return f"{token!r} is {index} for the policy and {f'is {known[token]}' if token in known else 'does not exist'} for the reward model"


def require_critic_vocabulary(reward_model: str, policy: str, *, trust_remote_code: bool = False) -> None:
    """Raises ModelError where a critic that starts from the reward model could not read what the policy writes."""
    if difference := other_vocabulary(reward_model, policy, trust_remote_code=trust_remote_code):
        raise ModelError(
            f"reward.path = {reward_model}: PPO's critic starts from it, and its tokenizer is not that of the policy {policy}: "
            f"{difference}; "
            'set ppo.critic_model = "value_head", or take an algorithm without a critic, or a reward model of this tokenizer '
            f"(`corral rm --model.path={policy}`)"
        )
