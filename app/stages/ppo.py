"""The PPO stage: starts learner, publisher and checkpoints around the loop, and compares the policy before and after."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.alarms import AlarmWatch
from app.checkpoint import CheckpointStore, OverlappedCheckpoints
from app.config.recipe import Recipe
from app.curves import read_curves
from app.data.embedded import gold_score
from app.data.encoding import Cuts, encode_prompts
from app.data.mixture import Mixture
from app.data.prompt_stream import PromptStream
from app.data.templates import Template
from app.errors import AlarmError, ConfigError
from app.experience import IntArray, Prompt
from app.formats.records import Message
from app.interfaces import Reward, Scorer
from app.kept_rollouts import RolloutRecorder
from app.report import write_report
from app.run_folder import RunFolder
from app.run_layout import CHECKPOINTS, EXAMPLES_FILE, METRICS_FILE, MODEL, ROLLOUTS
from app.stages.actor_learner import LoopState, Parts, actor_learner_loop
from app.stages.evaluate import Answers, Gold, answer, compare, write_examples
from app.stages.healing import HealedLearner
from app.stages.interruption import stop_requests
from app.stages.preparation import Prepared
from app.stages.rewards import MAIN, StartScoring, open_reward, rewriting_note, served_reward_models
from app.tracking import RunTracker
from app.workers.learner import LearnerSpec
from app.workers.learner_group import RayLearner, learner_group
from app.workers.rollout_pool import Note, VllmRolloutPool, rollout_pool
from app.workers.weight_publisher import WeightPublisher, canaries_of


@dataclass(frozen=True)
class PromptSets:
    """Prompts to train on, and held-out ones to compare answers on; truncated: how many of both lost tokens."""

    train: PromptStream
    held_out: list[Prompt]
    truncated: int

    @property
    def all(self) -> list[Prompt]:
        return [*self.train.prompts, *self.held_out]


def prompt_sets(recipe: Recipe, prepared: Prepared) -> PromptSets:
    """Both sides of the corpus as token ids; at most `evaluation.prompts` held-out ones. Raises as `require_encoded_references`."""
    corpus, cuts = prepared.corpus, Cuts()
    references = recipe.ppo.reward.delta or "ppo.reward.delta" in recipe.tune.space  # of some trials
    items = list(corpus.train.prompts)  # decoded once
    sides = (items, corpus.validation.prompts[: recipe.evaluation.prompts])
    train, held_out = (list(encode_prompts(side, prepared.template, recipe.data, cuts, references=references)) for side in sides)
    mixture = Mixture.of((item.dataset for item in items), corpus.settings)
    sets = PromptSets(PromptStream(train, mixture), held_out, cuts.truncated)
    require_encoded_references(recipe, sets)
    return sets


def require_encoded_references(recipe: Recipe, prompts: PromptSets) -> None:
    """Raises ConfigError when ppo.reward.delta asks for reference answers that no prompt to train on has; commands have refused such
    data as they read it."""
    if recipe.ppo.reward.delta and all(prompt.reference is None for prompt in prompts.train.prompts):
        raise ConfigError(
            "ppo.reward.delta = true: no prompt in the data has a reference answer to compare with: set ppo.reward.delta = false"
        )


def gold_of(recipe: Recipe) -> Gold | None:
    """The embedded task's own judge, which no training ever sees; None on data whose truth is unknown."""
    if recipe.data.path != "embedded":
        return None
    return lambda prompt, text: gold_score([Message.of(message) for message in prompt.messages], text)


def open_pool(
    recipe: Recipe,
    model_path: str,
    prompts: Sequence[Prompt],
    eos_id: int,
    placement: Sequence[Any] = (),
    note: Note = lambda text: None,
) -> AbstractContextManager[VllmRolloutPool]:
    """Rollout engines holding the policy in `model_path`, with room for the longest of `prompts`; `note` hears of lost ones."""
    return rollout_pool(
        model_path,
        recipe.rollout,
        precision=recipe.model.precision,
        max_prompt_length=max(len(prompt.ids) for prompt in prompts),
        eos_ids=[eos_id],
        seed=recipe.run.seed,
        deadline_seconds=recipe.run.deadline_seconds,
        placement=placement,
        note=note,
        exact=recipe.run.determinism == "exact",
    )


def start_learner(
    recipe: Recipe, policy_path: str, reward_path: str, placement: Sequence[Any] = (), *, pretraining: Path | None = None
) -> AbstractContextManager[RayLearner]:
    """Policy from the SFT model, critic (where it is a model of its own) from the reward model. pretraining: token cache of the text that
    ppo.pretraining mixes in."""
    spec = LearnerSpec(
        policy_path=policy_path,
        critic_path=reward_path,
        precision=recipe.model.precision,
        temperature=recipe.rollout.temperature,
        config=recipe.ppo,
        seed=recipe.run.seed,
        trust_remote_code=recipe.model.trust_remote_code,
        pretraining=pretraining,
        shares_gpu=recipe.rollout.shares_gpus,
    )
    return learner_group(spec, deadline_seconds=recipe.run.deadline_seconds, placement=placement)


def train_ppo(
    recipe: Recipe,
    run: RunFolder,
    tracker: RunTracker,
    template: Template,
    prompts: PromptSets,
    *,
    policy_path: str,
    reward_path: str,
    pool: VllmRolloutPool,
    start_scoring: StartScoring,
    learner_placement: Sequence[Any] = (),
    pretraining: Path | None = None,
) -> dict[str, Any]:
    """Train, export `DIR/ppo/model` and compare it with the policy it started from. Goes on from the newest checkpoint, also
    where the learner loses a process (see `HealedLearner`).

    pool: engines that hold the policy in `policy_path`, or are still loading it; learner_placement, pretraining: see
    `start_learner`.
    Raises Interrupted with a checkpoint saved when the run is asked to stop, and what `actor_learner_loop` raises.
    """
    folder = run.stage("ppo")
    if len(prompts.held_out) < 2:
        raise ConfigError("evaluation needs at least two held-out prompts: raise data.val_split")
    gold = gold_of(recipe)
    with (
        HealedLearner(
            lambda: start_learner(recipe, policy_path, reward_path, learner_placement, pretraining=pretraining),
            restarts=recipe.ppo.max_restarts,
            forget=pool.discard,
            forget_first=recipe.rollout.loads_alone and recipe.rollout.min_engines is None,  # else those that wait queue behind it
            note=tracker.note,
        ) as learner,
        served_reward_models(
            recipe.reward.model_paths(),
            reward_path,
            policy_path,
            template.decode,
            start_scoring,
            trust_remote_code=recipe.model.trust_remote_code,
        ) as models,
        open_reward(recipe.reward, models, template.decode, deadline_seconds=recipe.run.deadline_seconds) as reward,
    ):
        judge = models[MAIN]
        if note := rewriting_note(models):
            tracker.event("ppo", 0, note)
        pool.ready()
        learner.ready()
        tracker.note(f"ppo: the policy answers {len(prompts.held_out)} held-out prompts before it is trained")
        before = answer(pool, judge, prompts.held_out, template, recipe.evaluation, gold)
        canaries = canaries_of(before.rollouts)

        def train(group: RayLearner) -> LoopState:
            state = _resume_and_run(
                recipe, run, tracker, group, pool, reward, judge.scorer, prompts.train, template, canaries, stop_requested
            )
            group.export(str(folder / MODEL))
            return state

        with stop_requests() as stop_requested:
            state = learner.run(train)
        tracker.note(f"ppo: the policy answers the same {len(prompts.held_out)} prompts after {state.step} steps")
        after = answer(pool, judge, prompts.held_out, template, recipe.evaluation, gold)
    results = compare(before, after, recipe.evaluation) | loop_results(run, state) | {"truncated": prompts.truncated}
    write_examples(run.path / EXAMPLES_FILE, prompts.held_out, before, after, recipe.evaluation.examples)
    tracker.log("evaluation", state.step, _scalars(before, after))
    return results


def _resume_and_run(
    recipe: Recipe,
    run: RunFolder,
    tracker: RunTracker,
    learner: RayLearner,
    pool: VllmRolloutPool,
    reward: Reward,
    scorer: Scorer,
    prompts: PromptStream,
    template: Template,
    canaries: Sequence[IntArray],
    stop_requested: Callable[[], bool],
) -> LoopState:
    """The loop from the newest checkpoint, or from the start, to its last step."""
    store = CheckpointStore(run.stage("ppo") / CHECKPOINTS)
    saved = store.latest()
    state = LoopState()
    if saved is not None:
        learner.load(str(saved.path))
        state = LoopState.restore(saved.state)
        tracker.note(f"ppo: going on from step {state.step}")
    tracker.begin("ppo", recipe.ppo.steps, done=state.step)
    watch = AlarmWatch(recipe.alarms, steps_before(run.path / METRICS_FILE, state.step))
    recorder = RolloutRecorder(run.stage("ppo") / ROLLOUTS, recipe.ppo, template.decode, template.pad_id)
    publisher = weight_publisher(recipe, learner, pool, canaries)
    try:
        with OverlappedCheckpoints(store, deadline_seconds=recipe.run.deadline_seconds) as checkpoints:
            parts = Parts(
                learner, pool, publisher, reward, scorer, tracker, checkpoints, prompts, template.pad_id,
                recipe.rollout.max_new_tokens, watch, recorder,
            )  # fmt: skip
            state = actor_learner_loop(parts, recipe.ppo, state, seed=recipe.run.seed, stop_requested=stop_requested)
    except AlarmError:
        write_report(run.path)  # its curves and alarms tell why
        raise
    tracker.end("ppo")
    return state


def weight_publisher(recipe: Recipe, learner: RayLearner, pool: VllmRolloutPool, canaries: Sequence[IntArray]) -> WeightPublisher:
    """Weights go the way of `rollout.transfer`."""
    rollout, limit = recipe.rollout, recipe.ppo.max_logprob_mismatch
    return WeightPublisher(
        learner, pool, canaries, limit=limit, transfer=rollout.chosen_transfer, tensor_parallel=rollout.engines.tensor_parallel
    )


def steps_before(path: Path, last: int) -> list[dict[str, float]]:
    """Metrics of the loop's steps up to `last`, oldest first, as earlier sessions logged them."""
    steps: dict[int, dict[str, float]] = {}
    for curve in read_curves(path).get("ppo", {}).values():
        for step, value in curve.points.items():
            if step <= last and value is not None:
                steps.setdefault(step, {})[curve.name] = value
    return [steps[step] for step in sorted(steps)]


def loop_results(run: RunFolder, state: LoopState) -> dict[str, Any]:
    """What the summary says about the loop, over all its steps, also those of earlier starts of the run."""
    curves = read_curves(run.path / METRICS_FILE)["ppo"]

    def values(name: str) -> list[float]:
        return [value for value in curves[name].points.values() if value is not None]

    seconds = values("seconds")
    return {
        "steps": state.step,
        "tokens_per_second": sum(rate * spent for rate, spent in zip(values("tokens_per_second"), seconds, strict=True)) / sum(seconds),
        "max_logprob_mismatch": max(values("max_logprob_mismatch") + values("push/canary_mismatch")),
    }


def _scalars(before: Answers, after: Answers) -> dict[str, float]:
    means = {"score_before": before.scores.mean(), "score_after": after.scores.mean(), "kl": after.kl.mean()}
    if before.gold is not None and after.gold is not None:
        means |= {"gold_before": before.gold.mean(), "gold_after": after.gold.mean()}
    return {name: float(value) for name, value in means.items()}
