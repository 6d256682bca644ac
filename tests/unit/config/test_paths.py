"""Every field that names a file or folder says so by its type: commands that move paths find it there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, get_args

import pytest
from pydantic.fields import FieldInfo

from app.config.loading import load_recipe
from app.config.paths import named_paths, path_mark
from app.config.recipe import Recipe
from app.rewards import REWARDS
from app.schema import Config, InputPath, OutputPath

SAYS_PATH = re.compile(r"(^|_)(path|file|dir|folder|log)s?$")
NONE_OF_OURS = {"SetConfig.files"}
"""Files inside a data set of the hub."""


def classes(kind: type[Config], seen: set[type[Config]]) -> set[type[Config]]:
    """A config class and all that its fields hold, at any depth."""
    if kind not in seen:
        seen.add(kind)
        for info in kind.model_fields.values():
            for part in parts(info.annotation):
                if isinstance(part, type) and issubclass(part, Config):
                    classes(part, seen)
    return seen


def parts(annotation: Any) -> Iterator[Any]:
    yield annotation
    for part in get_args(annotation):
        yield from parts(part)


def fields() -> dict[str, FieldInfo]:
    """Every field of every section, free table and kind of reward, as Class.field."""
    seen: set[type[Config]] = set()
    for kind in (Recipe, *REWARDS.values()):
        classes(kind, seen)
    return {f"{kind.__name__}.{name}": info for kind in seen for name, info in kind.model_fields.items()}


def test_every_field_that_is_called_a_path_is_marked_as_one() -> None:
    texts = {name: info for name, info in fields().items() if str in parts(info.annotation)}
    called = {name for name in texts if SAYS_PATH.search(name.partition(".")[2])} - NONE_OF_OURS
    assert len(called) >= 9 and {"RewardModelPart.paths", "SetConfig.path", "ChatModelConfig.path"} <= called
    assert {name for name, info in fields().items() if path_mark(info) is not None} == called


@pytest.mark.parametrize("annotation", [InputPath, InputPath | None, tuple[InputPath, ...], dict[str, list[InputPath]]])
def test_a_mark_is_found_wherever_it_stands(annotation: Any) -> None:
    assert path_mark(FieldInfo.from_annotation(annotation)) == get_args(InputPath)[1]
    assert path_mark(FieldInfo.from_annotation(str)) is None


def test_paths_of_a_recipe_by_their_keys() -> None:
    words = ["--reward.parts.a.type=reward_model", '--reward.parts.a.paths=["x", "y"]', "--serving.chat.talk.path=z", "--sft.lora.rank=4"]
    found = {named.key: (named.all, named.mark) for named in named_paths(load_recipe(None, words))}
    read, written = get_args(InputPath)[1], get_args(OutputPath)[1]
    assert found == {
        "run.dir": (("runs/run",), written),
        "reward.parts.a.paths": (("x", "y"), read),
        "serving.chat.talk.path": (("z",), read),
    }
