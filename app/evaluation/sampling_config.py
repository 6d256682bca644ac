"""How the answers of a sampling report are sampled: Open-Assistant's configuration files, as far as vLLM can follow them.

    {"default": {"generate_args": {...}}, "configurations": [{"name": "k50", "generate_args": {"top_k": 50}}, ...]}

Every entry is `default` with its own fields over it; `generate_args` are merged one by one.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from app.errors import ConfigError
from app.schema import Config

DEFAULT_SET: dict[str, Any] = {
    "default": {"generate_args": {"do_sample": True, "temperature": 1.0}},
    "configurations": [
        {"name": "k50", "generate_args": {"top_k": 50, "top_p": 0.95, "repetition_penalty": 1.2}},
        {"name": "nucleus9", "generate_args": {"temperature": 0.8, "top_p": 0.9}},
        {"name": "magic_numbers", "generate_args": {"top_k": 9607, "top_p": 0.242}},
        {"name": "greedy", "generate_args": {"do_sample": False}},
    ],
}
"""Open-Assistant's own set without what vLLM lacks: beam search and typical sampling."""

ENTRY_FIELDS = {"name": str, "generate_args": dict, "system": str}
REMEDIES = {
    "pre_text": "give the text as `system`, a system message in front of the conversation",
    "system_profile": "write what it says into `system`",
    "human_name": "remove it, the model's chat template names the roles",
    "bot_name": "remove it, the model's chat template names the roles",
    "add_prefix_tokens": "remove it, the model's chat template writes its tokens",
}
ASK_NOTHING = {"num_beams": 1, "typical_p": 1.0}
"""Settings of what vLLM lacks that ask for nothing of it."""


class GenerateArgs(Config):
    """Sampling of one answer; names and meanings are those of `generate` in transformers, without its default top_k of 50."""

    do_sample: bool = True
    """False takes the likeliest token every time."""
    temperature: float = Field(1.0, ge=0)
    """0 takes the likeliest token every time."""
    top_k: int = Field(0, ge=0)
    """Sample from the k likeliest tokens; 0 from all."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample from the likeliest tokens that together have this probability."""
    min_p: float = Field(0.0, ge=0, le=1)
    """Leave out tokens less likely than this share of the likeliest one."""
    repetition_penalty: float = Field(1.0, gt=0)
    """Above 1 makes tokens less likely that stand in prompt or answer already."""
    max_new_tokens: int = Field(256, ge=1)
    """Token limit of the answer."""
    min_new_tokens: int = Field(0, ge=0)
    """The answer does not end before this many tokens."""

    @model_validator(mode="after")
    def _limits_are_in_order(self) -> GenerateArgs:
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens = {self.min_new_tokens} is above max_new_tokens = {self.max_new_tokens}")
        return self

    @property
    def is_greedy(self) -> bool:
        """Every sample would be the same."""
        return not self.do_sample or self.temperature == 0

    def engine_settings(self) -> dict[str, Any]:
        """The same in vLLM's names."""
        return {
            "temperature": 0.0 if self.is_greedy else self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "max_tokens": self.max_new_tokens,
            "min_tokens": self.min_new_tokens,
        }


@dataclass(frozen=True)
class SamplingConfig:
    """system: a message in front of every conversation that has none."""

    name: str
    generate_args: GenerateArgs
    system: str | None = None

    def as_params(self) -> dict[str, Any]:
        """What a report records: the arguments that were given, and the token limit."""
        given = self.generate_args.model_dump(exclude_unset=True)
        return given if self.system is None else {**given, "system": self.system}


def read_configurations(file: Path | None, *, max_new_tokens: int) -> list[SamplingConfig]:
    """The configurations in a JSON file, by default `DEFAULT_SET`; `max_new_tokens` holds where a configuration names none.

    Raises ConfigError for a file that cannot be read, and for a name or an argument that is unknown or that vLLM has not.
    """
    source = "the default set" if file is None else str(file)
    document = DEFAULT_SET if file is None else _read(file)
    unknown = set(document) - {"default", "configurations"}
    if unknown or not isinstance(document.get("configurations"), list) or not document["configurations"]:
        wrong = f"unknown key {sorted(unknown)[0]!r}" if unknown else "no list `configurations` with at least one entry"
        raise ConfigError(f"{source}: {wrong}; it holds `default` and `configurations`, see docs/evaluation.md")
    default = _entry(document.get("default") or {}, f"{source}: default")
    configurations = [
        _merged(default, _entry(entry, f"{source}: configuration {number}"), f"{source}: configuration {number}", max_new_tokens)
        for number, entry in enumerate(document["configurations"], 1)
    ]
    name, count = Counter(configuration.name for configuration in configurations).most_common(1)[0]
    if count > 1:
        raise ConfigError(f"{source}: {count} configurations are named {name!r}; give each its own name")
    return configurations


def _read(file: Path) -> dict[str, Any]:
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror}); check the path of --config") from error
    except ValueError as error:
        raise ConfigError(f"{file}: no valid JSON ({error}); mend it, see docs/evaluation.md") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{file}: holds no JSON object; it holds `default` and `configurations`, see docs/evaluation.md")
    return document


def _entry(entry: Any, where: str) -> Mapping[str, Any]:
    """`default` or one configuration, with known fields of the right types."""
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{where} is no JSON object; give it as {{name, generate_args}}")
    for field in entry:
        if field not in ENTRY_FIELDS:
            remedy = REMEDIES.get(field, f"known are {', '.join(ENTRY_FIELDS)}")
            raise ConfigError(f"{where}: {field!r} is not supported: {remedy}")
    for field, value in entry.items():
        if not isinstance(value, ENTRY_FIELDS[field]):
            raise ConfigError(f"{where}: {field} must be {'an object' if ENTRY_FIELDS[field] is dict else 'a text'}; write it as one")
    return entry


def _merged(default: Mapping[str, Any], entry: Mapping[str, Any], where: str, max_new_tokens: int) -> SamplingConfig:
    merged = {**default, **entry}
    if not merged.get("name"):
        raise ConfigError(f"{where} has no name; results are reported under it")
    arguments = {"max_new_tokens": max_new_tokens, **default.get("generate_args", {}), **entry.get("generate_args", {})}
    arguments = {name: value for name, value in arguments.items() if name not in ASK_NOTHING or value != ASK_NOTHING[name]}
    for name in arguments:
        if name not in GenerateArgs.model_fields:
            raise ConfigError(
                f"{where} ({merged['name']}): generate_args.{name} = {json.dumps(arguments[name])} is nothing that vLLM samples with: "
                f"remove it or the configuration; known are {', '.join(GenerateArgs.model_fields)}"
            )
    try:
        return SamplingConfig(merged["name"], GenerateArgs(**arguments), merged.get("system"))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(["generate_args", *map(str, first["loc"])])
        raise ConfigError(f"{where} ({merged['name']}): {place}: {first['msg'].removeprefix('Value error, ')}: change it") from error
