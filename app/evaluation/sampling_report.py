"""Sampling reports: prompts, and what a model answered to each under several sampling configurations.

The JSON has the keys of Open-Assistant's reports. A prompt that is more than one user turn also has its `messages`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from app.errors import DataError
from app.formats.records import Message

Conversation = tuple[Message, ...]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


class Turn(_Part):
    """One message of a prompt."""

    role: Literal["system", "user", "assistant"]
    content: str


class SamplingResult(_Part):
    """The answers under one sampling configuration."""

    sampling_config: str
    sampling_params: dict[str, Any]
    outputs: tuple[str, ...]


class PromptResults(_Part):
    """prompt: its last user turn; messages: the whole conversation, where there is more to it."""

    prompt: str
    messages: tuple[Turn, ...] | None = None
    results: tuple[SamplingResult, ...]

    @model_validator(mode="after")
    def _asks_something(self) -> PromptResults:
        if self.messages is not None and (not self.messages or self.messages[-1].role != "user"):
            raise ValueError("`messages` do not end in a turn of the user")
        return self

    @classmethod
    def of(cls, conversation: Sequence[Message], results: Iterable[SamplingResult]) -> PromptResults:
        turns = tuple(Turn(role=message.role, content=message.content) for message in conversation)
        alone = len(turns) == 1 and turns[0].role == "user"
        return cls(prompt=turns[-1].content, messages=None if alone else turns, results=tuple(results))

    @property
    def conversation(self) -> Conversation:
        """What was answered, ending in a user turn."""
        if self.messages is None:
            return (Message("user", self.prompt),)
        return tuple(Message(turn.role, turn.content) for turn in self.messages)


class SamplingReport(_Part):
    """args: how the report was made."""

    model_name: str
    date: str
    args: dict[str, Any]
    prompts: tuple[PromptResults, ...]

    def as_json(self) -> dict[str, Any]:
        """The report as JSON writes it."""
        return self.model_dump(mode="json", exclude_none=True)


@dataclass(frozen=True)
class Answer:
    """One output of a report, and where it came from."""

    text: str
    model_name: str
    config: str
    params: Mapping[str, Any]


def read_report(file: str | Path) -> SamplingReport:
    """Raises DataError for a file that is missing, no sampling report, or without a single output."""
    remedy = "name a report that `corral evaluate samples` wrote"
    try:
        report = SamplingReport.model_validate(json.loads(Path(file).read_text(encoding="utf-8")))
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); {remedy}") from error
    except ValidationError as error:  # a ValueError too
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise DataError(f"{file}: no sampling report ({f'{place}: ' if place else ''}{first['msg']}); {remedy}") from error
    except ValueError as error:
        raise DataError(f"{file}: no valid JSON ({error}); {remedy}") from error
    if not any(result.outputs for prompt in report.prompts for result in prompt.results):
        raise DataError(f"{file}: no prompt in it has an output; {remedy}")
    return report


def pool(reports: Iterable[SamplingReport]) -> dict[Conversation, list[Answer]]:
    """All answers to each prompt, over all configurations and reports, in order of appearance. Prompts without answers are left out."""
    answers: dict[Conversation, list[Answer]] = {}
    for report in reports:
        for prompt in report.prompts:
            for result in prompt.results:
                for text in result.outputs:
                    answer = Answer(text, report.model_name, result.sampling_config, result.sampling_params)
                    answers.setdefault(prompt.conversation, []).append(answer)
    return answers
