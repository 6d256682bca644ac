"""Kinds of reward by name. A rule is a file with its fields and `score`, and a line here; `app.rewards.mix` puts parts together."""

from app.rewards.function import FunctionReward
from app.rewards.length import LengthReward
from app.rewards.part import RewardPart
from app.rewards.pattern import PatternReward
from app.rewards.repetition import RepetitionReward
from app.rewards.reward_model import RewardModelPart

REWARDS: dict[str, type[RewardPart]] = {
    "reward_model": RewardModelPart,
    "function": FunctionReward,
    "length": LengthReward,
    "pattern": PatternReward,
    "repetition": RepetitionReward,
}
