"""Which reward models and processes the parts of a recipe lead to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from app.config.reward import RewardConfig
from app.interfaces import Scorer
from app.rewards.mix import RuleSource
from app.rewards.reward_model import RewardModelReward
from app.stages.rewards import MAIN, open_reward, reward_scorers


def test_each_model_is_served_once_and_the_main_one_not_again(tmp_path: Path) -> None:
    folders = [str(tmp_path / name) for name in ("main", "second", "judge")]
    main, second, judge = folders
    for folder in folders:
        Path(folder).mkdir()
    journal: list[str] = []

    @contextmanager
    def start_scoring(reward_path: str, reference_path: str) -> Iterator[Any]:
        journal.append(f"start {Path(reward_path).name}")
        yield f"scorer of {Path(reward_path).name}"
        journal.append(f"stop {Path(reward_path).name}")

    parts = {
        "quality": {"type": "reward_model", "paths": [main, second], "combine": "min", "weight": 2.0},
        "same": {"type": "reward_model"},
        "judge": {"type": "reward_model", "paths": [judge, second], "hold_out": True},
        "short": {"type": "length", "maximum": 5},
    }
    config = RewardConfig.model_validate({"path": "elsewhere", "parts": parts, "combine": "min"})
    main_scorer: Scorer = "main scorer"  # type: ignore[assignment]
    with reward_scorers(config, main_scorer, main, "sft", start_scoring) as scorers:
        assert journal == ["start second", "start judge"]
        with open_reward(config, scorers, decode=str, deadline_seconds=1) as mix:
            quality, same, held_out, short = mix.parts
    assert journal[2:] == ["stop judge", "stop second"]
    assert scorers[MAIN] == "main scorer" and mix.combine == "min"
    assert quality.sources == (RewardModelReward(main_scorer), RewardModelReward(scorers[second]))
    assert (quality.name, quality.combine, quality.weight, quality.hold_out) == ("quality", "min", 2.0, False)
    assert same.sources == (RewardModelReward(main_scorer),)
    assert held_out.hold_out and held_out.sources == (RewardModelReward(scorers[judge]), RewardModelReward(scorers[second]))
    assert isinstance(short.sources[0], RuleSource) and short.sources[0].run is None
