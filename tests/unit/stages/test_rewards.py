"""Which reward models and processes the parts of a recipe lead to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from app.config.reward import RewardConfig
from app.rewards.mix import RuleSource
from app.rewards.reward_model import RewardModelReward
from app.stages.rewards import MAIN, open_reward, rewriting_note, served_reward_models


def test_each_model_is_served_once_and_the_main_one_not_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [str(tmp_path / name) for name in ("main", "second", "judge")]
    main, second, judge = folders
    for folder in folders:
        Path(folder).mkdir()
    journal: list[str] = []

    @contextmanager
    def start_scoring(reward_paths: Sequence[str], reference_path: str) -> Iterator[Any]:
        names = [Path(path).name for path in reward_paths]
        journal.append(f"start {names} beside {reference_path}")
        yield [f"scorer of {name}" for name in names]
        journal.append("stop")

    parts = {
        "quality": {"type": "reward_model", "paths": [main, second], "combine": "min", "weight": 2.0},
        "same": {"type": "reward_model"},
        "judge": {"type": "reward_model", "paths": [judge, second], "hold_out": True},
        "short": {"type": "length", "maximum": 5},
    }
    config = RewardConfig.model_validate({"path": "elsewhere", "parts": parts, "combine": "min"})
    monkeypatch.setattr("app.stages.rewards.other_vocabulary", lambda scorer, policy, **_: "a difference" if scorer == judge else None)
    monkeypatch.setattr("app.stages.rewards.Rewriter.of", lambda folder, decode, **_: f"rewriter for {Path(folder).name}")
    with served_reward_models(config.model_paths(), main, "sft", str, start_scoring, trust_remote_code=False) as models:
        assert journal == ["start ['main', 'second', 'judge'] beside sft"]
        with open_reward(config, models, decode=str, deadline_seconds=1) as mix:
            quality, same, held_out, short = mix.parts
    assert journal[1:] == ["stop"]
    assert models[MAIN] == models[main] == RewardModelReward("scorer of main")  # type: ignore[arg-type]
    assert models[judge] == RewardModelReward("scorer of judge", "rewriter for judge")  # type: ignore[arg-type]
    note = rewriting_note(models)
    assert note is not None and note.startswith(f"{judge}: another tokenizer than the policy's; answers are scored as text")
    assert rewriting_note({MAIN: models[MAIN]}) is None
    assert mix.combine == "min"
    assert quality.sources == (models[main], models[second])
    assert (quality.name, quality.combine, quality.weight, quality.hold_out) == ("quality", "min", 2.0, False)
    assert same.sources == (models[MAIN],)
    assert held_out.hold_out and held_out.sources == (models[judge], models[second])
    assert isinstance(short.sources[0], RuleSource) and short.sources[0].run is None
