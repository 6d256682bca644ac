"""Hyperparameter search over PPO with Ray Tune: every trial is one PPO run in a placement group of its own, and all trials
share one scoring service."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from app.alarms import AlarmWatch
from app.config.loading import with_values
from app.config.recipe import Recipe
from app.config.tune import Choice, TuneConfig
from app.data.corpus import Corpus
from app.data.prompt_stream import PromptStream
from app.data.templates import Template
from app.errors import ConfigError, CorralError
from app.interfaces import Scorer
from app.run_folder import RunFolder
from app.stages.actor_learner import LoopState, Parts, actor_learner_loop
from app.stages.pipeline import Pipeline
from app.stages.ppo import open_pool, start_learner, weight_publisher
from app.stages.rewards import MAIN, StartScoring, open_reward, reward_scorers
from app.tracking import RunTracker
from app.workers.weight_transfer import CANARIES

logger = logging.getLogger(__name__)

DRIVER_CPUS = 0.01  # a trial's own process only waits for its actors


@dataclass(frozen=True)
class TrialInputs:
    """What every trial is given; `config` of a trial overrides `recipe`."""

    recipe: Recipe
    sft_path: str
    reward_path: str
    scorers: Mapping[str, Scorer]
    prompts: PromptStream
    template: Template


@dataclass
class TrialTracker:
    """Reports each PPO step of a trial to Tune; the objective is averaged over the last `window` steps."""

    config: TuneConfig
    objectives: deque[float] = field(init=False)

    def __post_init__(self) -> None:
        self.objectives = deque(maxlen=self.config.window)

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        self.objectives.append(metrics["score_mean"] - self.config.kl_price * metrics["kl"])
        shown = {name: metrics[name] for name in ("score_mean", "kl", "entropy", "response_length")}
        tune.report({"objective": sum(self.objectives) / len(self.objectives), "step": step, **shown})

    def event(self, stage: str, step: int, text: str) -> None:
        """Goes to the trial's own log."""
        logger.warning("%s: step %d: %s", stage, step, text)


class TrialNotes(tune.Callback):
    """Tells in the driver how each trial ended."""

    def __init__(self, tracker: RunTracker, recipe: Recipe) -> None:
        self._tracker, self._recipe, self._ended = tracker, recipe, 0

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune saves its callbacks for a resumption that is never asked for

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial came to its last step, or ASHA stopped it."""
        metrics = trial.last_result
        self._tracker.log("tune", self._ended + 1, {name: metrics[name] for name in ("objective", "score_mean", "kl")})
        self._note(f"after {metrics['step']} of {self._recipe.ppo.steps} steps, objective {metrics['objective']:.3f}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial failed; the search goes on without it."""
        self._note("with an error")

    def _note(self, how: str) -> None:
        self._ended += 1
        self._tracker.note(f"tune: trial {self._ended} of {self._recipe.tune.trials} ended {how}")


class NoCheckpoints:
    """A trial that is stopped or lost is not resumed."""

    def save(self, step: int, state: Mapping[str, Any], write: Callable[[Path], None]) -> None:
        """Keep nothing."""


def run_trial(config: dict[str, Any], *, inputs: TrialInputs) -> None:
    """One PPO run on the actors of this trial's placement group: bundle 0 is this process, then learners, then engines."""
    recipe = with_values(inputs.recipe, config, "tune.space")
    group = ray.util.get_current_placement_group()
    learners = recipe.ppo.workers.count

    def bundles(first: int, count: int) -> list[PlacementGroupSchedulingStrategy]:
        return [PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=first + i) for i in range(count)]

    with (
        open_pool(
            recipe, inputs.sft_path, inputs.prompts.prompts, inputs.template.eos_id, bundles(1 + learners, recipe.rollout.engines.count)
        ) as pool,
        start_learner(recipe, inputs.sft_path, inputs.reward_path, bundles(1, learners)) as learner,
        open_reward(recipe.reward, inputs.scorers, inputs.template.decode, deadline_seconds=recipe.run.deadline_seconds) as reward,
    ):
        pool.ready()
        learner.ready()
        canaries = [prompt.ids for prompt in inputs.prompts.prompts[:CANARIES]]
        parts = Parts(
            learner,
            pool,
            weight_publisher(recipe, learner, pool, canaries),
            reward,
            inputs.scorers[MAIN],
            TrialTracker(recipe.tune),
            NoCheckpoints(),
            inputs.prompts,
            inputs.template.pad_id,
            recipe.rollout.max_new_tokens,
            AlarmWatch(recipe.alarms),
        )
        actor_learner_loop(parts, recipe.ppo, LoopState(), seed=recipe.run.seed)


def trial_resources(recipe: Recipe) -> tune.PlacementGroupFactory:
    """The bundles of one trial, in the order that `run_trial` uses them."""
    bundles = [{"CPU": DRIVER_CPUS}]
    for workers in (recipe.ppo.workers, recipe.rollout.engines):
        bundles += [{"CPU": workers.cpus, **({"GPU": workers.gpus} if workers.gpus else {})}] * workers.count
    return tune.PlacementGroupFactory(bundles, strategy="PACK")


def search_space(config: TuneConfig) -> dict[str, Any]:
    """Tune's own search-space objects, by dotted config key. Raises ConfigError for an empty space."""
    if not config.space:
        raise ConfigError(
            'tune.space is empty: name at least one key, such as "ppo.kl.coef" = {type = "loguniform", low = 0.01, high = 0.2}'
        )
    space: dict[str, Any] = {}
    for name, domain in config.space.items():
        if isinstance(domain, Choice):
            space[name] = tune.choice(list(domain.values))
        else:
            space[name] = getattr(tune, domain.type)(domain.low, domain.high)
    return space


def run_tune(recipe: Recipe, run: RunFolder, corpus: Corpus, tracker: RunTracker, start_scoring: StartScoring) -> dict[str, Any]:
    """`corral tune`: search and write `summary.json` with `tune.trials`, `tune.best` and `tune.best_config`; returns the summary.

    Raises ConfigError for an empty space and CorralError when every trial failed.
    """
    space = search_space(recipe.tune)
    with Pipeline(recipe, run, corpus, tracker) as pipeline:
        pipeline.check_trainable("ppo")
        sft_path = pipeline.sft_model()
        reward_path = pipeline.given_reward_model(sft_path)
        pipeline.close_engines()  # trials bring their own, in their own placement groups
        with (
            start_scoring(reward_path, sft_path) as scorer,
            reward_scorers(recipe.reward, scorer, reward_path, sft_path, start_scoring) as scorers,
        ):
            inputs = TrialInputs(recipe, sft_path, reward_path, scorers, pipeline.prompts.train, pipeline.prepared.template)
            tracker.note(f"tune: {recipe.tune.trials} trials of up to {recipe.ppo.steps} PPO steps, {recipe.tune.concurrent} at a time")
            grid = _search(recipe, inputs, space, run, TrialNotes(tracker, recipe))
        rows = [trial_row(result, recipe.ppo.steps) for result in grid]
        done = [row for row in rows if row["objective"] is not None]
        if not done:
            raise CorralError(
                f"all {len(rows)} trials failed, the first with: {rows[0]['error']}; their logs are under {run.path / 'tune'}"
            )
        best = max(done, key=lambda row: float(row["objective"]))
        results = {"trials": rows, "best": best, "best_config": best["config"], "metric": "objective"}
        return pipeline.summarise(tune=results)


def _search(recipe: Recipe, inputs: TrialInputs, space: dict[str, Any], run: RunFolder, notes: TrialNotes) -> tune.ResultGrid:
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the newer output prints a banner however little it is asked to say
    trainable = tune.with_resources(tune.with_parameters(run_trial, inputs=inputs), trial_resources(recipe))
    scheduler = ASHAScheduler(
        time_attr="step",
        max_t=recipe.ppo.steps,
        grace_period=min(recipe.tune.grace_steps, recipe.ppo.steps),
        reduction_factor=recipe.tune.reduction,
    )
    tuner = tune.Tuner(
        trainable,
        param_space=space,
        tune_config=tune.TuneConfig(
            metric="objective",
            mode="max",
            num_samples=recipe.tune.trials,
            max_concurrent_trials=recipe.tune.concurrent,
            scheduler=scheduler,
            trial_dirname_creator=lambda trial: f"trial_{trial.trial_id}",
        ),
        run_config=tune.RunConfig(name="tune", storage_path=str(run.path), verbose=0, callbacks=[notes]),
    )
    return tuner.fit()


def trial_row(result: Any, steps: int) -> dict[str, Any]:
    """One line of the table: a trial's configuration, how far it came, its last objective (null where it failed) and its error."""
    metrics = result.metrics or {}
    done = int(metrics.get("step", 0))
    return {
        "trial": Path(result.path).name,
        "config": dict(result.config or {}),
        "steps": done,
        "stopped_early": result.error is None and done < steps,
        "objective": metrics.get("objective"),
        "score": metrics.get("score_mean"),
        "kl": metrics.get("kl"),
        "error": None if result.error is None else str(result.error).strip().splitlines()[-1],
    }
