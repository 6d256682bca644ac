"""A reward that the user writes: `module:callable`."""

from __future__ import annotations

import importlib
import inspect
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import field_validator

from app.errors import ConfigError, first_line
from app.rewards.part import Failed, IsolatedPart, Sample

USE = "it is called with the conversation (a list of {role, content}) and the response's text, and with `ids` where it takes that name"


class FunctionReward(IsolatedPart):
    """What a function of the user's returns: `score(messages, response) -> float`, or with the token ids,
    `score(messages, response, *, ids)`. An exception, and what is no finite number, is a failed score of that rollout."""

    type: Literal["function"]
    function: str
    """`module:callable`; the module is looked for in the working directory and on the Python path."""

    @field_validator("function")
    @classmethod
    def _two_names(cls, function: str) -> str:
        module, colon, name = function.partition(":")
        if not colon or not all(part.isidentifier() for part in (*module.split("."), *name.split("."))):
            raise ValueError("not of the form module:callable, such as my_rewards:politeness")
        return function

    def check(self) -> None:
        """Import the function and see that it can be called as it will be. Raises ConfigError."""
        load_function(self.function)

    def score(self, samples: Sequence[Sample]) -> list[float | Failed]:
        """One answer per sample."""
        function = load_function(self.function)
        return [_call(function, sample) for sample in samples]


def load_function(name: str) -> Callable[[Sample], Any]:
    """The function `module:callable` as one of a sample. Raises ConfigError that says what is wrong with it."""
    module_name, _, attributes = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"function {name}: {error}: run the command in the module's folder, or put that on PYTHONPATH") from error
    except Exception as error:  # the module's own code may raise anything
        raise ConfigError(f"function {name}: importing {module_name} fails with {type(error).__name__}: {first_line(error)}") from error
    for attribute in attributes.split("."):
        if not hasattr(found, attribute):
            raise ConfigError(f"function {name}: {module_name} has no {attributes}: name a function of that module")
        found = getattr(found, attribute)
    if not callable(found):
        raise ConfigError(f"function {name}: {attributes} is of type {type(found).__name__}, not a function")
    return _adapted(found, name)


def _adapted(function: Callable[..., Any], name: str) -> Callable[[Sample], Any]:
    try:
        signature = inspect.signature(function)
    except ValueError as error:  # one of an extension module, which does not say what it takes
        raise ConfigError(f"function {name}: cannot be called ({error}): {USE}; write one in Python that calls it") from error
    takes_ids = "ids" in signature.parameters or any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    extra = ("ids",) if takes_ids else ()
    try:
        signature.bind([], "", **dict.fromkeys(extra))
    except TypeError as error:
        raise ConfigError(f"function {name}: cannot be called ({error}): {USE}") from error

    def call(sample: Sample) -> Any:
        return function([dict(message) for message in sample.messages], sample.text, **{key: sample.ids.tolist() for key in extra})

    return call


def _call(function: Callable[[Sample], Any], sample: Sample) -> float | Failed:
    try:
        score = float(function(sample))
    except Exception as error:  # noqa: BLE001 - whatever the user's code raises costs this score and no more
        return Failed(f"{type(error).__name__}: {first_line(error)}")
    return score if math.isfinite(score) else Failed(f"it returned {score}")
