"""One trial: a PPO run in a placement group of its own, which goes on from its own checkpoint, or under pbt and pb2 from another's."""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from app.alarms import AlarmWatch
from app.checkpoint import CheckpointStore, SavedCheckpoint, read_checkpoint
from app.config.loading import with_values
from app.config.recipe import Recipe
from app.config.tune import BY_ANSWERS, POPULATION, TuneConfig
from app.data.templates import Template
from app.durable import read_json, write_json
from app.errors import AlarmError, ConfigError, NonFiniteError
from app.planning.roles import TRIAL_CPUS
from app.rewards.reward_model import RewardModelReward
from app.run_layout import CHECKPOINTS, LOGS, MODEL
from app.search.records import REFUSED
from app.stages.actor_learner import LoopState, Parts, actor_learner_loop
from app.stages.evaluate import answer
from app.stages.ppo import PromptSets, gold_of, open_pool, require_encoded_references, start_learner, weight_publisher
from app.stages.rewards import MAIN, open_reward
from app.stages.tuning.records import VALUES, read_ended, trial_name
from app.stages.tuning.verdicts import Judge, Mark
from app.workers.stacks import write_stacks_on_signal
from app.workers.watchdog import watching
from app.workers.weight_publisher import CANARIES

logger = logging.getLogger(__name__)

POINTER = "checkpoint.json"
KEEP_ALONE, KEEP_IN_A_POPULATION = 2, 4
"""Checkpoints per trial; in a population another trial may still be about to read an older one."""

Evaluate = Callable[[], tuple[float, float]]
"""Mean score and mean KL of held-out answers of the policy as it is now."""


@dataclass(frozen=True)
class TrialInputs:
    """What every trial is given; its own values override `recipe`. folder: `DIR/tune`, which every node sees."""

    recipe: Recipe
    folder: str
    sft_path: str
    reward_path: str
    models: Mapping[str, RewardModelReward]
    prompts: PromptSets
    template: Template
    pretraining: Path | None = None


class Marked(Exception):
    """The trial is to be stopped; its placement is given back first."""

    def __init__(self, mark: Mark) -> None:
        super().__init__(mark.why)
        self.mark = mark


class TrialReporter:
    """Tracker and checkpoints of a trial's loop: after every step one report to Tune, with a checkpoint where one is due.

    What Tune keeps as a checkpoint only names the folder in which the trial's own store keeps it: learners write there from any node.
    """

    def __init__(self, recipe: Recipe, judge: Judge, watch: AlarmWatch, store: CheckpointStore) -> None:
        self._recipe, self._judge, self._watch, self._store = recipe, judge, watch, store
        self.evaluate: Evaluate | None = None
        self.export: Callable[[], None] = lambda: None

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """The loop measured a step."""
        self._judge.add(step, metrics)

    def event(self, stage: str, step: int, text: str) -> None:
        """Goes to the trial's own log."""
        logger.warning("%s: step %d: %s", stage, step, text)

    def save(self, step: int, state: Mapping[str, Any], write: Callable[[Path], None]) -> None:
        """The loop ended a step. Raises Marked."""
        config, last = self._recipe.tune, self._recipe.ppo.steps
        if self.evaluate is not None and self._judge.evaluation_due(step, last):
            self._judge.add_evaluation(*self.evaluate())
        if mark := self._judge.mark():
            raise Marked(mark)
        result = self._judge.result()
        if step == last:
            self.export()
            # said here, not by the end of the function: a population must not copy over a trial that has nothing left to train
            tune.report(result | {"done": True})
        elif step % config.checkpoint_every == 0:
            saved = self._store.save(step, trial_state(state, self._judge, self._watch, self._recipe), write)
            with tempfile.TemporaryDirectory() as folder:
                write_json(Path(folder) / POINTER, {"trial": saved.parent.parent.name, "checkpoint": saved.name})
                tune.report(result, checkpoint=tune.Checkpoint.from_directory(folder))
        else:
            tune.report(result)

    def settle(self, *, wait_for_it: bool) -> None:
        """Nothing is under way: Tune may hand a checkpoint to another trial as soon as it is reported."""


def trial_state(loop: Mapping[str, Any], judge: Judge, watch: AlarmWatch, recipe: Recipe) -> dict[str, Any]:
    """Everything of a trial that is not in its learner, JSON-able."""
    alarms = [{name: value for name, value in step.items() if math.isfinite(value)} for step in watch.history]  # as from metrics.jsonl
    return {"loop": dict(loop), "steps": judge.kept, "alarms": alarms, "kl": recipe.ppo.kl.model_dump(mode="json")}


def restored_loop(state: Mapping[str, Any], recipe: Recipe) -> LoopState:
    """The loop state of a checkpoint. Where the trial's KL settings are others than those it was written under, their controller starts."""
    loop = state["loop"]
    changed = state["kl"] != recipe.ppo.kl.model_dump(mode="json")
    return LoopState.restore({**loop, "kl_coef": None} if changed else loop)


def kept_checkpoints(config: TuneConfig) -> int:
    """How many of a trial's checkpoints stay."""
    return KEEP_IN_A_POPULATION if config.scheduler in POPULATION else KEEP_ALONE


def newest_checkpoint(folder: Path) -> SavedCheckpoint | None:
    """The checkpoint that Tune names, or where that has been replaced since or its pointer was lost with a machine, the newest of the
    trial that saved it. None: begin at the start."""
    named = tune.get_checkpoint()
    if named is None:
        return None
    with named.as_directory() as path:
        pointer = read_json(Path(path) / POINTER) if (Path(path) / POINTER).is_file() else {"trial": Path(path).parent.name}
    checkpoints = folder / pointer["trial"] / CHECKPOINTS
    saved = read_checkpoint(checkpoints / pointer["checkpoint"]) if "checkpoint" in pointer else None
    return saved or CheckpointStore(checkpoints).latest()


def run_trial(config: dict[str, Any], *, inputs: TrialInputs) -> None:
    """The trainable. Every report carries `Judge.result`; a trial that its own configuration spoils ends with a mark, as does one that
    the recipe refuses; any other error is Tune's to retry."""
    shared = inputs.recipe
    folder = Path(inputs.folder)
    name = trial_name(tune.get_context().get_trial_id())
    if ended := read_ended(folder).get(name):  # the search was killed before it had noted this end
        tune.report({**Judge(shared.tune).result(), **{key: value for key, value in ended.items() if value is not None}, "done": True})
        return
    saved = newest_checkpoint(folder)
    judge = Judge(shared.tune, saved.state["steps"] if saved else ())
    watch = AlarmWatch(shared.alarms, saved.state["alarms"] if saved else ())
    write_stacks_on_signal(f"trial {name}")
    try:
        recipe = with_values(shared, config[VALUES], "tune.space")
        reporter = TrialReporter(recipe, judge, watch, CheckpointStore(folder / name / CHECKPOINTS, kept_checkpoints(shared.tune)))
        with watching(folder / name / LOGS, note=logger.warning, early_share=recipe.run.stacks_after):
            train(recipe, inputs, reporter, watch, saved, folder / name / MODEL)
        return
    except Marked as marked:
        mark = marked.mark
    except NonFiniteError as error:
        mark = Mark("non-finite", str(error))
    except AlarmError as error:
        mark = Mark.of_alarm(error)
    except ConfigError as error:
        mark = Mark(REFUSED, str(error))
    tune.report(judge.result(mark) | {"done": True})


def train(
    recipe: Recipe, inputs: TrialInputs, reporter: TrialReporter, watch: AlarmWatch, saved: SavedCheckpoint | None, model: Path
) -> None:
    """PPO on the actors of this trial's placement group: bundle 0 is this process, then learners, then engines. Raises as
    `require_encoded_references`, before any of them starts."""
    require_encoded_references(recipe, inputs.prompts)
    group = ray.util.get_current_placement_group()
    learners = recipe.ppo.workers.count

    def bundles(first: int, count: int) -> list[PlacementGroupSchedulingStrategy]:
        return [PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=first + i) for i in range(count)]

    sets, template, decode = inputs.prompts, inputs.template, inputs.template.decode
    with ExitStack() as stack:
        engines = bundles(1 + learners, recipe.rollout.engines.count)
        pool = stack.enter_context(open_pool(recipe, inputs.sft_path, sets.all, template.eos_id, engines, note=logger.warning))
        ranks = bundles(1, learners)
        learner = stack.enter_context(start_learner(recipe, inputs.sft_path, inputs.reward_path, ranks, pretraining=inputs.pretraining))
        deadline = recipe.run.deadline_seconds
        reward = stack.enter_context(open_reward(recipe.reward, inputs.models, decode, deadline_seconds=deadline))
        pool.ready()
        learner.ready()
        state = LoopState()
        if saved is not None:
            learner.load(str(saved.path))
            state = restored_loop(saved.state, recipe)
        judge = inputs.models[MAIN]
        canaries = [prompt.ids for prompt in sets.train.prompts[:CANARIES]]
        if recipe.tune.objective in BY_ANSWERS:
            held_out = sets.held_out[: recipe.tune.eval_prompts]
            gold = gold_of(recipe) if recipe.tune.objective == "gold" else None

            def evaluate() -> tuple[float, float]:
                answers = answer(pool, judge, held_out, template, recipe.evaluation, gold)
                scores = answers.scores if answers.gold is None else answers.gold
                return float(scores.mean()), float(answers.kl.mean())

            reporter.evaluate = evaluate
        reporter.export = lambda: learner.export(str(model))
        parts = Parts(
            learner, pool, weight_publisher(recipe, learner, pool, canaries), reward, judge.scorer, reporter, reporter, sets.train,
            template.pad_id, recipe.rollout.max_new_tokens, watch,
        )  # fmt: skip
        every_step = recipe.ppo.model_copy(update={"save_every": 1})  # the reporter decides what a step leaves
        actor_learner_loop(parts, every_step, state, seed=recipe.run.seed)


def trial_resources(recipe: Recipe) -> tune.PlacementGroupFactory:
    """The bundles of one trial, in the order that `train` uses them."""
    bundles = [{"CPU": TRIAL_CPUS}]
    for workers in (recipe.ppo.workers, recipe.rollout.engines):
        bundles += [{"CPU": workers.cpus, **({"GPU": workers.gpus} if workers.gpus else {})}] * workers.count
    return tune.PlacementGroupFactory(bundles, strategy="PACK")
