"""Hyperparameter search over PPO with Ray Tune: every trial is one PPO run in a placement group of its own, and all trials
share one scoring service."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from app.config.recipe import Recipe
from app.data.corpus import Corpus
from app.errors import CorralError
from app.run_folder import RunFolder
from app.run_layout import CHECKPOINTS, MODEL, SEARCH
from app.search.records import FAILED
from app.stages.pipeline import Pipeline
from app.stages.rewards import StartScoring, rewriting_note, served_reward_models
from app.stages.tuning.records import trial_row, write_history
from app.stages.tuning.search import begin_or_resume, run_search
from app.stages.tuning.trial import TrialInputs
from app.stages.tuning.verdicts import best_row
from app.tracking import RunTracker


def run_tune(
    recipe: Recipe, run: RunFolder, corpus: Corpus, tracker: RunTracker, start_scoring: StartScoring, concurrent: int
) -> dict[str, Any]:
    """`corral tune`: search and write `summary.json` with `tune.trials`, `tune.best` and `tune.best_config`; returns the summary.

    concurrent: trials at a time. Goes on with a search that was killed. Raises what `run_search` raises, and CorralError when every
    trial failed.
    """
    with Pipeline(recipe, run, corpus, tracker) as pipeline:
        pipeline.check_trainable("tune")
        sft_path = pipeline.sft_model()
        reward_path = pipeline.given_reward_model(sft_path)
        pipeline.close_engines()  # trials bring their own, in their own placement groups
        results = run.finished(SEARCH)
        if results is not None:
            tracker.note(f"tune: already finished, taken from {run.path / SEARCH}")
            return pipeline.summarise(tune=results)
        folder = run.stage(SEARCH)
        begin_or_resume(folder, pipeline.parents)
        template, trust = pipeline.prepared.template, recipe.model.trust_remote_code
        with served_reward_models(
            recipe.reward.model_paths(), reward_path, sft_path, template.decode, start_scoring, trust_remote_code=trust
        ) as models:
            if note := rewriting_note(models):
                tracker.event("tune", 0, note)
            inputs = TrialInputs(recipe, str(folder), sft_path, reward_path, models, pipeline.prompts, template, pipeline.pretraining())
            trials = run_search(recipe, inputs, run.path, concurrent, tracker)
        rows = [trial_row(trial, recipe.ppo.steps) for trial in trials]
        write_history(folder)
        if all(row["status"] == FAILED for row in rows):
            raise CorralError(f"all {len(rows)} trials failed, the first with: {rows[0]['error']}; their logs are under {folder}")
        best = best_row(rows)
        keep_model(folder, rows, best)
        results = {"trials": rows, "best": best, "best_config": None if best is None else best["config"], "metric": "objective"}
        run.finish(SEARCH, results, pipeline.parents)
        return pipeline.summarise(tune=results)


def keep_model(folder: Path, rows: Sequence[Mapping[str, Any]], best: Mapping[str, Any] | None) -> None:
    """Remove the models and checkpoints of all trials but the model of the best one."""
    for row in rows:
        shutil.rmtree(folder / row["trial"] / CHECKPOINTS, ignore_errors=True)
        if best is None or row["trial"] != best["trial"]:
            shutil.rmtree(folder / row["trial"] / MODEL, ignore_errors=True)
