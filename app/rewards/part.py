"""What every part of the reward is made of. A part that reads text is its own config: frozen fields and a `score`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import ConfigDict, Field

from app.experience import IntArray
from app.schema import Config


@dataclass(frozen=True)
class Sample:
    """What a rule sees of a rollout. messages: the conversation as {"role", "content"}; text, ids (int32 [T], with the end token
    where one was sampled): the response; finished: whether it ended by itself, before the token limit."""

    messages: tuple[Mapping[str, str], ...]
    text: str
    ids: IntArray
    finished: bool


@dataclass(frozen=True)
class Failed:
    """In place of a score: there is none, for this reason."""

    reason: str


class RewardPart(Config):
    """One named part of the reward."""

    model_config = ConfigDict(polymorphic_serialization=True)  # a table of parts keeps the fields of each kind

    type: str
    """Kind of reward: one of the names in app.rewards."""
    weight: float = 1.0
    """Factor of this part in the combination."""
    hold_out: bool = False
    """Score and log this part, never train on it."""


class RulePart(RewardPart):
    """A part that needs no model: it maps samples to scores."""

    def score(self, samples: Sequence[Sample]) -> Sequence[float | Failed]:
        """One score per sample, in order; what is not finite counts as failed."""
        raise NotImplementedError

    def check(self) -> None:
        """Find early what is wrong with the part on this machine. Raises ConfigError."""


class IsolatedPart(RulePart):
    """A rule that may hang or crash: it runs in processes of its own and holds up the loop no longer than its deadline, which starts
    over where a process was lost."""

    deadline_seconds: float = Field(60.0, gt=0)
    """Time for one batch of rollouts; what has no score by then failed, and the process is replaced."""
    processes: int = Field(1, ge=1)
    """Processes that share a batch."""
