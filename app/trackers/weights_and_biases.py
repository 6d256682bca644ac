"""Weights & Biases: a process of its library sends what it is given, and keeps it in the run folder as well."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

import wandb

from app.trackers.service import Point, RunFacts

FINISH_SECONDS = 20.0
"""How long the end of a session waits for what is still to be sent."""


class WandbRun:
    """Every stage has its own x axis, `<stage>/step`: W&B's own step counter cannot go back where a resumed stage does."""

    def __init__(self, facts: RunFacts) -> None:
        settings = wandb.Settings(
            console="off", silent=True, save_code=False, disable_git=True, finish_timeout=FINISH_SECONDS, finish_timeout_raises=True
        )
        self._run = wandb.init(
            project=facts.project,
            name=facts.name,
            id=facts.known_id or uuid.uuid4().hex[:12],
            resume="allow",
            dir=facts.path,
            config=dict(facts.config),
            allow_val_change=True,  # between sessions, of keys such as run.deadline_seconds
            settings=settings,
        )
        self._stages: set[str] = set()

    @property
    def run_id(self) -> str:
        return str(self._run.id)

    @property
    def address(self) -> str:
        folder = self._run.settings.sync_dir
        return f"offline, `wandb sync {folder}` sends it" if self._run.offline else str(self._run.url)

    def log(self, points: Sequence[Point]) -> None:
        for stage, step, _, metrics in points:
            if stage not in self._stages:
                self._run.define_metric(f"{stage}/step", hidden=True)
                self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
                self._stages.add(stage)
            self._run.log({f"{stage}/step": step} | {f"{stage}/{name}": value for name, value in metrics.items()})

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))
