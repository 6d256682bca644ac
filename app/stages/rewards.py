"""The reward of a recipe, with the reward models and processes that its parts need."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

from app.config.reward import RewardConfig
from app.experience import IntArray
from app.interfaces import Scorer
from app.models.load import seen_from_anywhere
from app.models.replies import Rewriter
from app.models.vocabulary import other_vocabulary
from app.rewards.mix import Part, RewardMix, RuleSource
from app.rewards.part import IsolatedPart, RewardPart, RulePart
from app.rewards.reward_model import RewardModelPart, RewardModelReward
from app.workers.rule_processes import RuleProcesses

StartScoring = Callable[[Sequence[str], str], AbstractContextManager[Sequence[Scorer]]]
"""(reward model folders, reference policy folder) -> a scorer per reward model, of one service, for the length of a `with` block."""

Decode = Callable[[IntArray], str]

MAIN = ""
"""Key of the main reward model: that of `reward.path`, or the one that was trained in this run."""


@contextmanager
def served_reward_models(
    paths: Sequence[str], reward_path: str, policy_path: str, decode: Decode, start_scoring: StartScoring, *, trust_remote_code: bool
) -> Iterator[dict[str, RewardModelReward]]:
    """Every reward model of `paths`, by its folder as the recipe writes it, and as MAIN that of `reward_path`; their service, which has
    the reference policy too, is up for the length of a `with` block.

    A model whose tokenizer is not the policy's is given the text, as its chat template writes it. decode: response ids -> text. Raises
    ModelError where a model has no chat template and needs one."""
    folders = {MAIN: reward_path, **{path: seen_from_anywhere(path) for path in paths}}
    served = list(dict.fromkeys(folders.values()))
    rewriters = {folder: _rewriter(folder, policy_path, decode, trust_remote_code) for folder in served}
    with start_scoring(served, policy_path) as scorers:
        yield {path: RewardModelReward(scorers[served.index(folder)], rewriters[folder]) for path, folder in folders.items()}


def _rewriter(folder: str, policy_path: str, decode: Decode, trust_remote_code: bool) -> Rewriter | None:
    if other_vocabulary(folder, policy_path, trust_remote_code=trust_remote_code) is None:
        return None
    return Rewriter.of(folder, decode, trust_remote_code=trust_remote_code)


def rewriting_note(models: Mapping[str, RewardModelReward]) -> str | None:
    """Which reward models are given text, for the record; None where all read the policy's token ids."""
    names = [path or "reward.path" for path, model in models.items() if model.rewrite is not None]
    if not names:
        return None
    return f"{', '.join(names)}: another tokenizer than the policy's; answers are scored as text, written by the model's own chat template"


@contextmanager
def open_reward(
    config: RewardConfig, models: Mapping[str, RewardModelReward], decode: Decode, *, deadline_seconds: float
) -> Iterator[RewardMix]:
    """The mix, with the processes of its isolated parts up for the length of a `with` block.

    models: see `served_reward_models`; decode: response ids -> text. Raises ConfigError where a part does not work in its process."""
    with ExitStack() as open_processes:
        waiting: list[RuleProcesses] = []

        def sources(name: str, part: RewardPart) -> tuple[RewardModelReward | RuleSource, ...]:
            if isinstance(part, RewardModelPart):
                return tuple(models[path] for path in part.paths or (MAIN,))
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
