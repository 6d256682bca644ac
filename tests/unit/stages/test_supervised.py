"""What the SFT and the reward-model stage do beside the training itself."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from app.config.loading import load_recipe
from app.data.mixture import Mixture
from app.stages import supervised


class Tracker:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def note(self, text: str) -> None:
        self.told.append(text)

    def begin(self, stage: str, steps: int) -> None:
        self.told.append(f"begin {stage} {steps}")

    def end(self, stage: str) -> None:
        self.told.append(f"end {stage}")


@pytest.mark.parametrize(
    ("warmup", "notes"),
    [
        (3, []),
        (
            4,
            [
                "sft.optimizer.warmup_steps = 4 is more than the 3 optimizer steps of this training: the rate rises to 75% of "
                "sft.optimizer.lr; lower the one, or raise the other"
            ],
        ),
    ],
)
def test_a_warm_up_that_the_data_ends_before_is_told(
    warmup: int, notes: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given: list[int] = []
    monkeypatch.setattr(supervised, "fit", lambda *_, steps, **__: given.append(steps))
    recipe, tracker = load_recipe(None, [f"--sft.optimizer.warmup_steps={warmup}"]), Tracker()
    task: Any = SimpleNamespace(stage="sft")
    mixture = Mixture.of(["data"] * 96, recipe.data.sources())
    supervised.train(task, recipe.sft, recipe, mixture=mixture, folder=tmp_path, tracker=tracker)  # type: ignore[arg-type]
    assert given == [3] and tracker.told == [*notes, "begin sft 3", "end sft"]
