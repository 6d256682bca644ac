"""Sampling configurations: merging, vLLM's names, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from app.errors import ConfigError
from app.evaluation.sampling_config import GenerateArgs, SamplingConfig, read_configurations


def read(folder: Path, document: Any, max_new_tokens: int = 64) -> list[SamplingConfig]:
    file = folder / "config.json"
    file.write_text(document if isinstance(document, str) else json.dumps(document))
    return read_configurations(file, max_new_tokens=max_new_tokens)


def test_the_default_set() -> None:
    configurations = {configuration.name: configuration for configuration in read_configurations(None, max_new_tokens=64)}
    assert list(configurations) == ["k50", "nucleus9", "magic_numbers", "greedy"]
    assert configurations["magic_numbers"].as_params() == {
        "max_new_tokens": 64,
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 9607,
        "top_p": 0.242,
    }
    assert [name for name, configuration in configurations.items() if configuration.generate_args.is_greedy] == ["greedy"]
    assert configurations["greedy"].generate_args.engine_settings()["temperature"] == 0


def test_an_entry_lies_over_the_default(tmp_path: Path) -> None:
    default = {"generate_args": {"max_new_tokens": 9, "min_new_tokens": 2, "temperature": 0.7, "num_beams": 1}, "system": "Be brief."}
    entries = [{"name": "plain"}, {"name": "own", "generate_args": {"temperature": 0.2, "max_new_tokens": 20}, "system": "Rhyme."}]
    plain, own = read(tmp_path, {"default": default, "configurations": entries})
    assert plain.as_params() == {"max_new_tokens": 9, "min_new_tokens": 2, "temperature": 0.7, "system": "Be brief."}
    assert own.system == "Rhyme."
    settings = own.generate_args.engine_settings()
    assert (settings["max_tokens"], settings["min_tokens"], settings["temperature"]) == (20, 2, 0.2)


def test_temperature_0_is_greedy() -> None:
    assert GenerateArgs(temperature=0.0).is_greedy
    assert not GenerateArgs(temperature=0.1).is_greedy


@pytest.mark.parametrize(
    ("entry", "parts"),
    [
        ({"name": "beam5", "generate_args": {"num_beams": 5}}, ["configuration 1 (beam5)", "num_beams = 5", "remove it", "top_k"]),
        ({"name": "typical", "generate_args": {"typical_p": 0.95}}, ["typical_p = 0.95"]),
        ({"name": "a", "generate_args": {"top_q": 1}}, ["top_q"]),
        ({"name": "a", "generate_args": {"top_p": 0}}, ["generate_args.top_p", "greater than 0"]),
        ({"name": "a", "generate_args": {"min_new_tokens": 65}}, ["min_new_tokens = 65 is above max_new_tokens = 64"]),
        ({"name": "a", "generate_args": [1]}, ["generate_args must be an object"]),
        ({"name": "a", "pre_text": "You are Joi"}, ["'pre_text'", "`system`"]),
        ({"name": "a", "human_name": "User"}, ["'human_name'", "chat template"]),
        ({"name": "a", "colour": "red"}, ["'colour'", "known are name, generate_args, system"]),
        ({"generate_args": {}}, ["configuration 1 has no name"]),
        ("k50", ["configuration 1 is no JSON object"]),
    ],
)
def test_what_is_refused(tmp_path: Path, entry: Any, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, {"configurations": [entry]})
    assert all(part in str(caught.value) for part in [str(tmp_path), *parts]), caught.value


@pytest.mark.parametrize(
    ("document", "part"),
    [
        ("{", "no valid JSON"),
        ([], "no JSON object"),
        ({}, "`configurations`"),
        ({"configurations": []}, "at least one entry"),
        ({"configuration": [{"name": "a"}]}, "unknown key 'configuration'"),
        ({"configurations": [{"name": "a"}, {"name": "a"}]}, "2 configurations are named 'a'"),
        ({"default": {"generate_args": {"penalty_alpha": 0.6}}, "configurations": [{"name": "a"}]}, "penalty_alpha"),
    ],
)
def test_malformed_files(tmp_path: Path, document: Any, part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        read(tmp_path, document)
    with pytest.raises(ConfigError, match=r"nowhere.json: cannot be read"):
        read_configurations(tmp_path / "nowhere.json", max_new_tokens=8)
