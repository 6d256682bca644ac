"""What PPO is trained against."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ModelWrapValidatorHandler, WrapValidator, field_validator, model_validator

from app.rewards import REWARDS
from app.rewards.part import RewardPart
from app.rewards.reward_model import RewardModelPart
from app.schema import Config, InputPath

NAME = re.compile(r"[A-Za-z0-9_-]+")
SINGLE = "reward_model"
"""Name of the only part where none is given."""


def of_kind(given: Any, handler: ModelWrapValidatorHandler[RewardPart]) -> RewardPart:
    """The part as the class that its `type` names."""
    if not isinstance(given, Mapping):
        return handler(given)
    kind = REWARDS.get(given.get("type", ""))
    if kind is None:
        raise ValueError(f"type = {given.get('type')!r}: not one of {', '.join(REWARDS)}")
    for key in given.keys() - kind.model_fields:
        near = difflib.get_close_matches(key, kind.model_fields, n=1)
        remedy = f"did you mean {near[0]}?" if near else f"it takes {', '.join(kind.model_fields)}"
        raise ValueError(f"unknown key {key}: {remedy}")
    return kind.model_validate(given)


class RewardConfig(Config):
    """One reward model (`path`), or a mix of named parts."""

    path: InputPath | None = None
    """Reward-model folder: the reward where `parts` is empty. PPO's critic starts from it and it judges the evaluation.
    `corral pipeline` fills it with the one it trains."""
    parts: dict[str, Annotated[RewardPart, WrapValidator(of_kind)]] = Field(default_factory=dict)
    """Named parts, such as `short = {type = "length", maximum = 200}`; types: reward_model, function, length, pattern, repetition."""
    combine: Literal["sum", "mean", "min"] = "sum"
    """A rollout's score: the sum of weight x score over the parts; that over the sum of weights; the smallest weight x score."""

    @field_validator("parts")
    @classmethod
    def _names(cls, parts: dict[str, RewardPart]) -> dict[str, RewardPart]:
        for name in parts:
            if not NAME.fullmatch(name):
                raise ValueError(f"{name!r} is no name of a part: use letters, digits, - and _")
        return parts

    @model_validator(mode="after")
    def _something_to_train_on(self) -> RewardConfig:
        trained = {name: part.weight for name, part in self.parts.items() if not part.hold_out}
        if self.parts and not trained:
            raise ValueError("reward.parts has only held-out parts: set hold_out = false for what PPO is to be trained on")
        for name, weight in trained.items():
            if weight == 0:
                raise ValueError(f"reward.parts.{name}.weight = 0: set hold_out = true to score it without training on it, or drop it")
        if self.combine == "mean" and trained and sum(trained.values()) <= 0:
            raise ValueError("the weights of reward.parts do not add up to more than 0: reward.combine = 'mean' divides by their sum")
        return self

    def mix(self) -> dict[str, RewardPart]:
        """The parts, with the short form written out."""
        return self.parts or {SINGLE: RewardModelPart(type="reward_model")}

    def model_paths(self) -> list[str]:
        """Folders of the reward models that the parts name, each once."""
        models = [part for part in self.parts.values() if isinstance(part, RewardModelPart)]
        return list(dict.fromkeys(path for part in models for path in part.paths))
