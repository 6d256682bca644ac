"""Rewards by name. Each turns rollouts into one float per rollout; adding one is a file and a line here."""

from app.rewards.reward_model import RewardModelReward

REWARDS = {"reward_model": RewardModelReward}
