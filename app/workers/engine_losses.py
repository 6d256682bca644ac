"""What each of the learner's engines descends in a step."""

from __future__ import annotations

import torch

from app.experience import Loss


def engine_losses(loss: Loss, *, value_head: bool, policy_learns: bool) -> dict[str, torch.Tensor]:
    """Losses by engine, `policy` and `critic`; one that is not named takes no step.

    value_head: values come from the policy's engine, which then descends both losses. policy_learns: whether it moves; a value head
    learns all the same (see `PolicyModel`: the trunk is then frozen).
    """
    losses = {"policy": loss.policy} if policy_learns else {}
    if loss.value is None:
        return losses
    if not value_head:
        return losses | {"critic": loss.value}
    return {"policy": loss.policy + loss.value if policy_learns else loss.value}
