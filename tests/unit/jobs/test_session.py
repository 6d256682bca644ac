"""How a training command ends: what went wrong first is what is told, and the run folder says it too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from app.config.recipe import Recipe
from app.errors import Interrupted
from app.storage.mirror import Mirror
from jobs.run_storage import mirrored


def recipe(tmp_path: Path, **run: Any) -> Recipe:
    return Recipe.model_validate({"run": {"dir": str(tmp_path / "run"), **run}})


@pytest.mark.parametrize("failed", [False, True])
def test_who_interrupts_the_last_sending_is_told_what_was_not_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failed: bool) -> None:
    """Hours of work are in the folder; that nothing had begun would be untrue."""

    def interrupted(self: Mirror) -> None:
        raise KeyboardInterrupt

    def start(self: Mirror, path: Path) -> None:
        self._path = path
        self._thread.start()

    monkeypatch.setattr("app.storage.lease.SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(Mirror, "push", interrupted)
    monkeypatch.setattr(Mirror, "start", start)

    def run() -> None:
        with mirrored(recipe(tmp_path, storage=f"file://{tmp_path}/kept")) as mirror:
            assert mirror is not None
            mirror.start(tmp_path / "run")
            if failed:
                raise Interrupted("stopped")

    with pytest.raises(Interrupted, match=r"file://.*kept lacks the last changes of .*run .stopped.: the same command sends them"):
        run()
