"""Trials whose PPO is a formula: everything of a search but the models. `python -m tests.local_ray.pretend_trials FOLDER RECIPE.json`
runs one in a process of its own, to be killed."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from app.alarms import AlarmWatch
from app.checkpoint import SavedCheckpoint
from app.config.loading import with_values
from app.config.recipe import Recipe
from app.errors import NonFiniteError
from app.stages.actor_learner import LoopState
from app.stages.tuning import search, trial
from app.stages.tuning.records import trial_row
from app.stages.tuning.trial import TrialInputs, TrialReporter, restored_loop
from app.tracking import RunTracker
from app.workers.watchdog import where_stacks_are

LOST = "lost"
"""A file of this name in the run folder: the trial with epochs = 2 has killed its own process once."""

TOGETHER = "together"
"""A file of this name in the run folder: how many trials wait for each other before their first step."""


def train(
    recipe: Recipe, inputs: TrialInputs, reporter: TrialReporter, watch: AlarmWatch, saved: SavedCheckpoint | None, model: Path
) -> None:
    """Scores rise by the learning rate; epochs = 3 blows the KL up, 4 the score; what has been learnt is all that a checkpoint holds."""
    state = LoopState() if saved is None else restored_loop(saved.state, recipe)
    learnt = 0.0 if saved is None else float((saved.path / "learnt").read_text())
    run = Path(inputs.folder).parent
    with (run / "begun").open("a") as begun:
        begun.write(f"{os.getpid()} {state.step} {learnt} {recipe.ppo.policy.lr} {recipe.ppo.epochs}\n")
    # where they wait for each other: the weakest come last and find the strongest's checkpoint, as Tune compares with who has come
    seconds = 0.05 + 0.3 * abs(math.log10(recipe.ppo.policy.lr / 0.2)) * (run / TOGETHER).is_file()
    while len((run / "begun").read_text().splitlines()) < int((run / TOGETHER).read_text() if (run / TOGETHER).is_file() else 0):
        time.sleep(0.05)
    for step in range(state.step + 1, recipe.ppo.steps + 1):
        time.sleep(seconds)
        if recipe.ppo.epochs == 2 and step == 4 and not (run / LOST).exists():
            (run / LOST).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if recipe.ppo.epochs == 4 and step == 2:
            where_stacks_are("a wait")
            raise NonFiniteError("metric loss is nan: lower the learning rate")
        learnt += recipe.ppo.policy.lr
        metrics = {"score_mean": learnt, "score_std": 1.0, "kl": 1.0, "entropy": 2.0, "response_length": 9.0}
        if recipe.ppo.epochs == 3:
            metrics["kl"] = 10.0 * step
        reporter.log("ppo", step, metrics)
        weights = str(learnt)
        reporter.save(step, dataclasses.asdict(LoopState(step=step)), lambda folder, text=weights: (folder / "learnt").write_text(text))  # type: ignore[misc]
    model.mkdir(parents=True)
    (model / "config.json").write_text(str(learnt))


def run_trial(config: dict[str, Any], *, inputs: TrialInputs) -> None:
    """`app.stages.tuning.trial.run_trial` with the formula."""
    trial.train = train
    trial.run_trial(config, inputs=inputs)


def run_search(recipe: Recipe, run: Path, concurrent: int = 2) -> list[Any]:
    """A search in the run folder `run`."""
    search.run_trial = run_trial
    nothing: Any = None
    inputs = TrialInputs(recipe, str(run / "tune"), "", "", {}, nothing, nothing)
    with RunTracker(run) as tracker:
        return search.run_search(recipe, inputs, run, concurrent, tracker)


def recipe(space: dict[str, Any], **tune: Any) -> Recipe:
    values = {f"tune.{name}": value for name, value in tune.items()} | {"tune.space": space}
    return with_values(Recipe(), {"ppo.steps": 8, "ppo.epochs": 1, "ppo.workers.cpus": 0.1, "rollout.engines.cpus": 0.1, **values})


def rows(trials: list[Any]) -> list[dict[str, Any]]:
    return [trial_row(trial, 8) for trial in trials]


def begun(run: Path) -> list[list[float]]:
    """[process, step, learnt, learning rate, epochs] of every start of a trial."""
    return [[float(word) for word in line.split()] for line in (run / "begun").read_text().splitlines()]


if __name__ == "__main__":
    import ray

    ray.init(logging_level="ERROR", log_to_driver=False)
    run_search(Recipe.model_validate_json(Path(sys.argv[2]).read_text()), Path(sys.argv[1]))
