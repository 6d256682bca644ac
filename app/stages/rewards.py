"""The reward of a recipe, with the reward models and processes that its parts need."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

from app.config.reward import RewardConfig
from app.experience import IntArray
from app.interfaces import Scorer
from app.models.load import seen_from_anywhere
from app.rewards.mix import Part, RewardMix, RuleSource
from app.rewards.part import IsolatedPart, RewardPart, RulePart
from app.rewards.reward_model import RewardModelPart, RewardModelReward
from app.workers.rule_processes import RuleProcesses

StartScoring = Callable[[Sequence[str], str], AbstractContextManager[Sequence[Scorer]]]
"""(reward model folders, reference policy folder) -> a scorer per reward model, of one service, for the length of a `with` block."""

MAIN = ""
"""Key of the scorer of the main reward model: that of `reward.path`, or the one that was trained in this run."""


@contextmanager
def reward_scorers(config: RewardConfig, reward_path: str, reference_path: str, start_scoring: StartScoring) -> Iterator[dict[str, Scorer]]:
    """A scorer for every reward model of the mix, by its folder as the recipe writes it, and as MAIN that of `reward_path`; their
    service is up for the length of a `with` block."""
    folders = {MAIN: reward_path, **{path: seen_from_anywhere(path) for path in config.model_paths()}}
    served = list(dict.fromkeys(folders.values()))
    with start_scoring(served, reference_path) as scorers:
        yield {path: scorers[served.index(folder)] for path, folder in folders.items()}


@contextmanager
def open_reward(
    config: RewardConfig, scorers: Mapping[str, Scorer], decode: Callable[[IntArray], str], *, deadline_seconds: float
) -> Iterator[RewardMix]:
    """The mix, with the processes of its isolated parts up for the length of a `with` block.

    scorers: see `reward_scorers`; decode: response ids -> text. Raises ConfigError where a part does not work in its process."""
    with ExitStack() as open_processes:
        waiting: list[RuleProcesses] = []

        def sources(name: str, part: RewardPart) -> tuple[RewardModelReward | RuleSource, ...]:
            if isinstance(part, RewardModelPart):
                return tuple(RewardModelReward(scorers[path]) for path in part.paths or (MAIN,))
            assert isinstance(part, RulePart)
            if not isinstance(part, IsolatedPart):
                return (RuleSource(part, decode),)
            processes = RuleProcesses(name, part)
            open_processes.callback(processes.close)
            waiting.append(processes)
            return (RuleSource(part, decode, processes.submit),)

        parts = []
        for name, part in config.mix().items():
            how = part.combine if isinstance(part, RewardModelPart) else "mean"
            parts.append(Part(name, sources(name, part), how, part.weight, part.hold_out))
        for processes in waiting:
            processes.ready(deadline_seconds)
        yield RewardMix(tuple(parts), config.combine)
