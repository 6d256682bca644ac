"""The search itself: Ray Tune over `run_trial`, from its beginning or from where it was killed."""

from __future__ import annotations

import os
import random
import shutil
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from ray import tune
from ray.tune.search import BasicVariantGenerator, ConcurrencyLimiter
from ray.tune.search.optuna import OptunaSearch
from ray.tune.tune import ResumeConfig

from app.config.recipe import Recipe
from app.config.search_space import Space, Suggestions, points, suggest
from app.config.tune import POPULATION
from app.durable import read_json, write_json
from app.errors import CheckpointError, Interrupted
from app.run_layout import PARENTS, SEARCH
from app.stages.tuning.records import VALUES, SearchRecords, read_ended, read_history, trial_name
from app.stages.tuning.schedules import METRIC, MODE, scheduler
from app.stages.tuning.trial import TrialInputs, run_trial, trial_resources
from app.tracking import RunTracker

SNAPSHOT_SECONDS = "2"
"""How much of a search that is killed Tune may have to look up in our own records."""


def suggested(trial: Suggestions, space: Space) -> dict[str, Any]:
    """Optuna's next configuration, as a trial's Tune config."""
    return {VALUES: suggest(space, trial)}


def optuna_search(recipe: Recipe) -> OptunaSearch:
    """Optuna's TPE, seeded; with `tune.multi_objective` over score and KL."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    objectives: tuple[Any, Any] = (["target_score", "target_kl"], ["max", "min"]) if recipe.tune.multi_objective else (METRIC, MODE)
    return OptunaSearch(partial(suggested, space=recipe.tune.space), *objectives, seed=recipe.run.seed)


def searcher(recipe: Recipe, concurrent: int) -> BasicVariantGenerator | ConcurrencyLimiter:
    """What hands Tune one configuration after the other, `concurrent` at a time; the members of a population all take turns."""
    if recipe.tune.searcher == "optuna":
        return ConcurrencyLimiter(optuna_search(recipe), concurrent)
    return BasicVariantGenerator(max_concurrent=0 if recipe.tune.scheduler in POPULATION else concurrent)


class AtATime(tune.Callback):
    """Keeps the number of trials at a time that this start asks for: with the rest of a searcher's state Tune restores the earlier one."""

    def __init__(self, limited: BasicVariantGenerator | ConcurrencyLimiter, concurrent: int) -> None:
        self._limited, self._concurrent = limited, limited.max_concurrent and concurrent

    def setup(self, *args: Any, **info: Any) -> None:
        """Tune is ready to begin, everything is restored."""
        self._limited.max_concurrent = self._concurrent


def state_to_resume(folder: Path) -> bool:
    """Whether Tune has saved a search in `folder`. Raises CheckpointError where what it saved last is cut."""
    states = sorted(folder.glob("experiment_state-*.json"))
    if not states:
        return False
    try:
        read_json(states[-1])
    except CheckpointError as error:
        remedy = "remove it to go on from the one before" if len(states) > 1 else f"remove {folder} to begin the search again"
        raise CheckpointError(f"{states[-1]} was being written when the search was killed: {remedy}") from error
    return True


def begin_or_resume(folder: Path, parents: Mapping[str, str]) -> None:
    """Make the search's folder ready: empty where nothing of a search can be gone on with. parents: content hashes of the data and models
    that trials start from. Raises CheckpointError where the search that is there began with others."""
    record = folder / PARENTS
    if not state_to_resume(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        write_json(record, dict(parents))
    elif changed := [name for name, digest in read_json(record).items() if parents.get(name) != digest]:
        raise CheckpointError(
            f"{folder} holds a search that began with another {' and '.join(changed)}: restore it, or choose another --run.dir"
        )


def run_search(recipe: Recipe, inputs: TrialInputs, run: Path, concurrent: int, tracker: RunTracker) -> list[Any]:
    """All trials, as Tune has them in the end. Goes on with a search that was killed: what has ended stays as it is, what was under way or
    failed continues from its checkpoints. Raises CheckpointError, and Interrupted on SIGINT."""
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the newer output prints a banner however little it is asked to say
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", SNAPSHOT_SECONDS)
    folder, config = run / SEARCH, recipe.tune
    resumed = state_to_resume(folder)
    by_optuna = config.searcher == "optuna"
    known = [] if by_optuna else points(config, recipe.run.seed)
    count = config.trials if by_optuna else len(known)
    records = SearchRecords(folder, tracker, recipe, count)
    if resumed:
        tracker.note(f"tune: going on with the search, {len(read_ended(folder))} of {count} trials have ended")
    tracker.note(f"tune: {count} trials of up to {recipe.ppo.steps} PPO steps, {concurrent} at a time")
    random.seed(recipe.run.seed)  # pbt's and pb2's own draws
    np.random.seed(recipe.run.seed)
    warnings.filterwarnings("ignore", message="Consider boosting PBT performance")  # by actors that change their configuration: ours end
    searching = searcher(recipe, concurrent)
    analysis = tune.run(
        tune.with_resources(tune.with_parameters(run_trial, inputs=inputs), trial_resources(recipe)),
        name=SEARCH,
        storage_path=str(run),
        config={} if by_optuna else {VALUES: tune.grid_search(known)},
        num_samples=config.trials if by_optuna else 1,
        search_alg=searching,
        scheduler=scheduler(recipe, read_history(folder), records.perturbed),
        max_failures=config.max_failures,
        resume_config=_nothing_twice() if resumed else None,
        callbacks=[records, AtATime(searching, concurrent)],
        trial_dirname_creator=lambda trial: trial_name(trial.trial_id),
        raise_on_failed_trial=False,
        verbose=0,
    )
    if records.ended < count:  # Tune ends what is under way as if it were done, and knows nothing of what was still to begin
        raise Interrupted(f"stopped, {records.ended} of {count} trials have ended; the same command goes on with the search")
    return list(analysis.trials)


def _nothing_twice() -> ResumeConfig:
    kinds = ResumeConfig.ResumeType
    return ResumeConfig(finished=kinds.SKIP, unfinished=kinds.RESUME, errored=kinds.RESUME)
