"""Whether two models read the same token ids."""

from __future__ import annotations

from app.errors import ModelError
from app.models.load import load_tokenizer, seen_from_anywhere


def require_same_vocabulary(scorer: str, policy: str, *, name: str, trust_remote_code: bool = False) -> None:
    """Raises ModelError, with the first token that differs, where the scorer's tokenizer gives another id to a token of the policy's, or
    lacks it: it is given the policy's token ids as they are. What the scorer has beyond them, it never sees; nor the padding.

    name: what the message calls the scorer, such as `reward.path`.
    """
    if seen_from_anywhere(scorer) == seen_from_anywhere(policy):
        return
    here, there = (load_tokenizer(seen_from_anywhere(path), trust_remote_code) for path in (policy, scorer))
    known = there.get_vocab()
    differing = [(index, token) for token, index in here.get_vocab().items() if known.get(token) != index and token != here.pad_token]
    if differing:
        index, token = min(differing)
        other = f"is {known[token]}" if token in known else "does not exist"
        raise ModelError(
            f"{name} = {scorer}: its tokenizer is not that of the policy {policy}, whose token ids it would score: {token!r} is {index} "
            f"for the policy and {other} for the reward model; train one with `corral rm --model.path={policy}`, or take two models of one "
            "tokenizer"
        )
